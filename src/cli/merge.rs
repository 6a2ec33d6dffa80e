//! `cauldron merge`: one recipe without a server. Same intake, queue, cache and bytes; progress on standard error, the
//! result as JSON on standard output.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;

use crate::app::App;
use crate::config::{Config, LogConfig, StorageConfig};
use crate::jobs::{Job, JobStatus, RecipeBody, Submission, Submit};
use crate::telemetry;

#[derive(Debug, Args)]
pub struct MergeArgs {
    /// File with the recipe as JSON, or (.yaml, .yml) a mergekit configuration; - is JSON on standard input.
    recipe: PathBuf,
    #[command(flatten)]
    storage: StorageConfig,
    #[command(flatten)]
    log: LogConfig,
}

pub fn run(args: MergeArgs) -> anyhow::Result<()> {
    telemetry::init_logs(&args.log)?;
    let is_yaml = matches!(
        args.recipe.extension().and_then(|e| e.to_str()),
        Some("yaml" | "yml")
    );
    let mut body = Vec::new();
    match args.recipe.to_str() {
        Some("-") => std::io::stdin().lock().read_to_end(&mut body).map(|_| ()),
        _ => std::fs::read(&args.recipe).map(|bytes| body = bytes),
    }
    .context("reading the recipe")?;
    let body = if is_yaml {
        RecipeBody::Yaml(body)
    } else {
        RecipeBody::Json(body)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let merged = runtime.block_on(merge(args, body));
    runtime.shutdown_timeout(Duration::from_secs(1));
    merged
}

async fn merge(args: MergeArgs, body: RecipeBody) -> anyhow::Result<()> {
    let app = App::open(Config::for_storage(args.storage, args.log)).await?;
    let taken = app.intake.submit(body, Submit::default()).await?;
    let id = match taken.submission {
        Submission::Created(job) | Submission::Existing(job) | Submission::Replayed(job) => job.id,
        Submission::QueueFull => bail!("the queue is full"),
        Submission::KeyReused => bail!("the idempotency key was used before"),
    };
    let worker = app.start_worker();
    let started = Instant::now();
    let job = loop {
        let job = app.jobs.get(id).await?.context("the job is gone")?;
        if job.status.is_terminal() {
            break job;
        }
        show(&app, &job, started);
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
            _ = tokio::signal::ctrl_c() => {
                app.jobs.cancel(id).await?;
                app.worker.stop(id);
            }
        }
    };
    app.shutdown.cancel();
    worker.await?;
    finish(&app, &job)
}

fn show(app: &App, job: &Job, started: Instant) {
    let Some(progress) = app
        .worker
        .progress(job.id)
        .filter(|_| std::io::stderr().is_terminal())
    else {
        return;
    };
    let (done, total) = progress.bytes();
    let share = done as f64 / total.max(1) as f64;
    let bar = "#".repeat((share * 40.0) as usize);
    let rate = done as f64 / started.elapsed().as_secs_f64().max(1e-3) / 1e9;
    eprint!("\r[{bar:<40}] {:5.1} %  {rate:.2} GB/s ", share * 100.0);
    let _ = std::io::stderr().flush();
}

fn finish(app: &App, job: &Job) -> anyhow::Result<()> {
    if std::io::stderr().is_terminal() {
        eprintln!();
    }
    match (job.status, job.digest, &job.error) {
        (JobStatus::Succeeded, Some(digest), _) => {
            let path = app.cache.path(&digest);
            println!(
                "{}",
                json!({"digest": digest, "lambda": job.lambda, "path": path})
            );
            Ok(())
        }
        (JobStatus::Cancelled, ..) => bail!("cancelled"),
        (_, _, Some(error)) => bail!("{}: {}", error.kind, error.detail),
        _ => bail!("the merge is {}", job.status.as_str()),
    }
}
