//! `cauldron sweep`: begins a sweep on a running server and shows how it goes; with a command of the user's that scores each
//! trial.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::http::Method;
use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::ops::{Service, Target, escape};
use crate::serving::Shares;

/// The model card of a folder.
const CARD: &str = "README.md";
/// How often the sweep is looked at.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub struct SweepArgs {
    /// JSON of POST /sweeps: recipe, tasks, search.
    request: PathBuf,
    /// A shell command that scores a trial: `{base_url}` and `{model}` in it are the server's /v1 and the trial's name. The score is
    /// the last number of the last line that it prints; higher is better. With it the request needs no tasks.
    /// A whole results file of lm-eval on standard output counts task by task.
    #[arg(long)]
    eval_command: Option<String>,
    /// At the end merge the winner, and download it into this new folder with a model card that tells how it was chosen.
    #[arg(long)]
    export: Option<PathBuf>,
    #[command(flatten)]
    target: Target,
}

pub fn run(args: SweepArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(sweep(args))
}

async fn sweep(args: SweepArgs) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&args.request)
        .with_context(|| format!("reading {}", args.request.display()))?;
    let mut request: Value = serde_json::from_str(&text).context("the request is no JSON")?;
    let fields = request.as_object_mut().context("the request is no JSON object")?;
    if args.eval_command.is_some() {
        fields.insert("score".to_owned(), json!("external"));
    }
    if !args.target.has_server() {
        bail!("--server: a sweep runs on a server");
    }
    if let Some(folder) = args.export.as_ref().filter(|folder| folder.exists()) {
        bail!("--export: {} is there already", folder.display());
    }
    let service = Service::open(args.target).await?;
    let begun = service.call(Method::POST, "/sweeps", Some(request)).await?;
    let id = begun["id"].as_str().context("the answer has no id")?.to_owned();
    eprintln!("sweep {id}");
    let path = format!("/sweeps/{}", escape(&id));
    tokio::select! {
        ended = follow(&service, &path, args.eval_command.as_deref()) => ended?,
        _ = tokio::signal::ctrl_c() => {
            service.call(Method::DELETE, &path, None).await?;
            bail!("the sweep is cancelled")
        }
    }
    match args.export {
        Some(folder) => export(&service, &path, &folder).await,
        None => Ok(()),
    }
}

/// Merges the winner on the server and downloads it.
async fn export(service: &Service, path: &str, folder: &Path) -> anyhow::Result<()> {
    let card = service.text(&format!("{path}/card.md")).await?;
    let taken = service
        .call(Method::POST, &format!("{path}/winner"), Some(json!({})))
        .await?;
    let job = format!("/merge/{}", escape(taken["merge"].as_str().unwrap_or_default()));
    let merged = loop {
        let merged = service.get(&job).await?;
        match merged["status"].as_str() {
            Some("queued" | "running") => tokio::time::sleep(LOOK).await,
            Some("succeeded") => break merged,
            _ => bail!("the merge of the winner failed: {}", merged["error"]),
        }
    };
    let digest = merged["digest"].as_str().context("the merge has no digest")?;
    let entry = service.get(&format!("/checkpoints/{}", escape(digest))).await?;
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty());
    std::fs::create_dir_all(parent.unwrap_or(Path::new(".")))?;
    // Whole or not at all.
    let part = parent
        .unwrap_or(Path::new("."))
        .join(format!(".{}.part", uuid::Uuid::new_v4()));
    std::fs::create_dir(&part).with_context(|| format!("--export {}", folder.display()))?;
    let fetched = fetch(service, digest, &entry, &card, &part).await;
    let fetched = fetched.and_then(|()| Ok(std::fs::rename(&part, folder)?));
    if fetched.is_err() {
        let _ = std::fs::remove_dir_all(&part);
    }
    fetched.with_context(|| format!("--export {}", folder.display()))?;
    eprintln!("{}", folder.display());
    Ok(())
}

async fn fetch(
    service: &Service,
    digest: &str,
    entry: &Value,
    card: &str,
    folder: &Path,
) -> anyhow::Result<()> {
    for file in entry["files"].as_array().into_iter().flatten() {
        // What a server names is no path.
        let name = file["name"].as_str().unwrap_or_default();
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\']) {
            bail!("the server names a file {name:?}");
        }
        if name != CARD {
            let link = format!("/checkpoints/{}/files/{}", escape(digest), escape(name));
            let bytes = file["size"].as_u64().context("the server gives a file no size")?;
            service.download(&link, &folder.join(name), bytes).await?;
        }
    }
    std::fs::write(folder.join(CARD), card)?;
    Ok(())
}

async fn follow(service: &Service, path: &str, command: Option<&str>) -> anyhow::Result<()> {
    let mut shown = 0;
    loop {
        let sweep = service.get(path).await?;
        let trials = sweep["trials"].as_array().map_or(&[][..], Vec::as_slice);
        for trial in &trials[shown.min(trials.len())..] {
            eprintln!("{}", line(trial, &sweep["total"]));
        }
        shown = trials.len();
        match sweep["status"].as_str() {
            Some("queued" | "running") => {}
            Some("done") => {
                let report = service.text(&format!("{path}/report.md")).await?;
                service.show(&sweep, &|_| report.clone());
                return Ok(());
            }
            status => bail!(
                "the sweep is {}: {}",
                status.unwrap_or("lost"),
                sweep["error"].as_str().unwrap_or("")
            ),
        }
        let (Some(command), Some(trial)) = (command, sweep["waiting"]["trial"].as_u64()) else {
            tokio::time::sleep(LOOK).await;
            continue;
        };
        let model = sweep["waiting"]["model"].as_str().unwrap_or_default();
        let given = match score(command, &service.base_url(), model).await {
            Ok(given) => given,
            Err(e) => {
                eprintln!("{e:#}");
                json!({"error": format!("{e:#}")})
            }
        };
        service
            .call(Method::POST, &format!("{path}/trials/{trial}/score"), Some(given))
            .await?;
    }
}

fn line(trial: &Value, total: &Value) -> String {
    let shares =
        Shares::deserialize(&trial["shares"]).map_or_else(|_| "?".to_owned(), |shares| shares.to_string());
    let score = match (&trial["score"], trial["error"].as_str()) {
        (Value::Number(score), _) => score.to_string(),
        (_, Some(error)) => format!("failed: {error}"),
        _ => "dropped".to_owned(),
    };
    format!(
        "{} of {total}: {shares}: {score}",
        trial["n"].as_u64().unwrap_or(0) + 1
    )
}

/// Runs the user's command for one trial: what to tell of its score. What it prints besides goes to standard error.
async fn score(command: &str, base_url: &str, model: &str) -> anyhow::Result<Value> {
    // It becomes part of a shell command, and comes from the server.
    let plain = |c: char| c.is_ascii_alphanumeric() || "._,:@-".contains(c);
    if model.is_empty() || !model.chars().all(plain) {
        bail!("the server names the trial {model:?}, which is no model's name");
    }
    let command = command.replace("{base_url}", base_url).replace("{model}", model);
    let output = tokio::task::spawn_blocking(move || {
        std::process::Command::new("sh")
            .args(["-c", &command])
            .stderr(Stdio::inherit())
            .output()
    });
    let output = output.await?.context("running --eval-command")?;
    let printed = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("--eval-command failed for {model}: {}", output.status);
    }
    let file = serde_json::from_str(&printed)
        .ok()
        .filter(|file: &Value| file["results"].is_object());
    if let Some(file) = file {
        return Ok(json!({"lm_eval": file}));
    }
    let score = last_number(&printed);
    let score = score.with_context(|| format!("--eval-command printed no number for {model}: {printed}"))?;
    Ok(json!({"score": score}))
}

fn last_number(printed: &str) -> Option<f64> {
    let line = printed.lines().rev().find(|line| !line.trim().is_empty())?;
    let words = line.split(|c: char| c.is_whitespace() || ":=,|\"'{}[]()".contains(c));
    words
        .rev()
        .find_map(|word| word.parse().ok())
        .filter(|number: &f64| number.is_finite())
}

#[cfg(test)]
mod tests {
    use super::last_number;

    #[test]
    fn the_score_is_the_last_number_of_the_last_line() {
        assert_eq!(last_number("loading 3 files\nacc: 0.25\n\n"), Some(0.25));
        assert_eq!(last_number(r#"{"acc": 0.5}"#), Some(0.5));
        assert_eq!(last_number("0.5\nnothing"), None);
        assert_eq!(last_number(""), None);
    }
}
