//! A sweep as people read it: a page of Markdown, and a table for other programs.

use std::fmt::Write;

use super::plan::Origin;
use super::{Select, Sweep, Trial, Verdict};
use crate::eval::Metric;
use crate::serving::OpenRecipe;

/// What a sweep did and found.
pub fn markdown(sweep: &Sweep) -> String {
    let mut out = String::new();
    let recipe = serde_json::to_string(&sweep.recipe).unwrap_or_default();
    let _ = writeln!(out, "# Sweep {}\n", sweep.id);
    let _ = writeln!(out, "Recipe: `{recipe}`\n");
    let _ = write!(
        out,
        "Search {}, seed {}; {} of {} trials. ",
        sweep.search.name(),
        sweep.seed,
        sweep.trials.len(),
        sweep.total
    );
    let _ = writeln!(out, "{}\n", judged(sweep));
    if let Some(verdict) = &sweep.verdict {
        let _ = writeln!(out, "{}\n", sentence(sweep, verdict));
    }
    let _ = writeln!(
        out,
        "| | shares | from | score, dev |{}{}",
        heads(sweep, ", dev"),
        heads(sweep, ", test")
    );
    let _ = writeln!(out, "|{}", " --- |".repeat(4 + 2 * sweep.tasks.len()));
    for trial in &sweep.trials {
        let mark = match &sweep.verdict {
            Some(verdict) if verdict.winner == trial.n => "**best**",
            Some(verdict) if verdict.pareto.contains(&trial.n) && sweep.tasks.len() > 1 => "front",
            _ => "",
        };
        let score = match (trial.score, &trial.error) {
            (Some(score), _) => number(score, trial.stderr),
            (None, Some(_)) => "failed".to_owned(),
            (None, None) => "dropped".to_owned(),
        };
        let _ = writeln!(
            out,
            "| {mark} | {} | {} | {score} |{}{}",
            trial.label(),
            origin(&trial.origin),
            cells(sweep, &trial.dev),
            cells(sweep, &trial.test)
        );
    }
    for trial in sweep.trials.iter().filter(|trial| trial.error.is_some()) {
        let _ = writeln!(
            out,
            "\nTrial {} failed: {}",
            trial.n,
            plain(trial.error.as_deref().unwrap_or_default())
        );
    }
    out
}

/// By what trials were told apart.
fn judged(sweep: &Sweep) -> String {
    let select = match sweep.select {
        Select::Mean => "mean of the tasks",
        Select::Min => "worst of the tasks",
    };
    match sweep.external {
        true => "Scores came from outside. The best of several scores is better on what chose it than it will be elsewhere: score it \
                 and the baselines once more on other items."
            .to_owned(),
        false => format!(
            "Selected by the {select} on dev items ({:.0} % of each task, split by seed {}), told of on the other items. `±` is one \
             standard error.",
            100.0 * sweep.split.dev,
            sweep.split.seed
        ),
    }
}

/// Heads of a column for each task.
fn heads(sweep: &Sweep, part: &str) -> String {
    let each = sweep.tasks.iter();
    each.map(|task| {
        let under = task.attack.as_ref();
        let under = under.map_or_else(String::new, |attack| {
            let rate = attack.rate.map_or_else(String::new, |rate| format!(" of {rate}"));
            format!(" under {}{rate}, seed {}", attack.kind.name(), attack.seed)
        });
        format!(" {}{under} ({}){part} |", plain(&task.name), plain(&task.metric))
    })
    .collect()
}

fn cells(sweep: &Sweep, metrics: &[Metric]) -> String {
    let cell = |index: usize| {
        let metric = metrics.get(index);
        metric.map_or_else(String::new, |m| number(m.value, m.stderr))
    };
    (0..sweep.tasks.len())
        .map(|index| format!(" {} |", cell(index)))
        .collect()
}

fn sentence(sweep: &Sweep, verdict: &Verdict) -> String {
    let (Some(winner), Some(baseline)) = (
        sweep.trials.get(verdict.winner),
        sweep.trials.get(verdict.baseline),
    ) else {
        return String::new();
    };
    if winner.n == baseline.n {
        return format!("No trial was better than the baseline {}.", winner.label());
    }
    let gain = number(verdict.test_gain.abs(), verdict.test_gain_stderr);
    let than = if verdict.test_gain < 0.0 {
        "worse"
    } else {
        "better"
    };
    let items = if sweep.external {
        "By these scores"
    } else {
        "On test items"
    };
    let honest = match verdict.within_noise {
        true => "That is within noise: another sample of items may turn it round.",
        false => "That is more than two standard errors.",
    };
    format!(
        "Best: **{}** (trial {}). {items} it is {gain} {than} than the best baseline, {} (trial {}). {honest}",
        winner.label(),
        winner.n,
        baseline.label(),
        baseline.n
    )
}

/// README.md of the winner, as the Hugging Face hub reads it; None without a verdict.
pub fn card(sweep: &Sweep) -> Option<String> {
    let verdict = sweep.verdict.as_ref()?;
    let winner = sweep.trials.get(verdict.winner)?;
    let open = OpenRecipe::new(sweep.recipe.clone()).ok()?;
    let recipe = serde_json::to_string_pretty(&open.spec_at(&winner.shares)).unwrap_or_default();
    let mut out = String::from("---\nlibrary_name: transformers\ntags:\n- merge\n- cauldron\n---\n\n");
    let _ = writeln!(
        out,
        "# {}, shares {}\n",
        plain(&sweep.recipe.method),
        winner.label()
    );
    let _ = writeln!(
        out,
        "Merged by Cauldron with this recipe:\n\n```json\n{recipe}\n```\n"
    );
    if let Some(fingerprint) = &winner.system_fingerprint {
        let _ = writeln!(out, "Digest of the checkpoint: `{}`.\n", plain(fingerprint));
    }
    let _ = writeln!(
        out,
        "## How it was chosen\n\nBy a {} search (Mixup Model Merge, arXiv 2502.15434; sweep {}, seed {}) over {} models, from {}. {}\n",
        sweep.search.name(),
        sweep.id,
        sweep.seed,
        sweep.trials.len(),
        origin(&winner.origin),
        judged(sweep)
    );
    let _ = writeln!(out, "{}\n", sentence(sweep, verdict));
    let baselines = sweep
        .trials
        .iter()
        .filter(|trial| trial.origin.is_baseline() && trial.n != winner.n);
    let _ = writeln!(
        out,
        "| shares | | score |{}",
        heads(sweep, if sweep.external { "" } else { ", test" })
    );
    let _ = writeln!(out, "|{}", " --- |".repeat(3 + sweep.tasks.len()));
    for trial in std::iter::once(winner).chain(baselines) {
        let metrics = if sweep.external { &trial.dev } else { &trial.test };
        let name = if trial.n == winner.n {
            "this model".to_owned()
        } else {
            origin(&trial.origin)
        };
        let score = trial
            .score
            .map_or_else(|| "-".to_owned(), |score| number(score, trial.stderr));
        let _ = writeln!(
            out,
            "| {} | {name} | {score} |{}",
            trial.label(),
            cells(sweep, metrics)
        );
    }
    Some(out)
}

fn origin(origin: &Origin) -> String {
    match origin {
        Origin::Plain => "plain method".to_owned(),
        Origin::Baseline => "baseline".to_owned(),
        Origin::Draw { alpha, seed } => format!("alpha {alpha}, seed {seed}"),
        Origin::Grid => "grid".to_owned(),
        Origin::Bayes => "expected improvement".to_owned(),
        Origin::Cma { generation } => format!("generation {generation}"),
    }
}

fn number(value: f64, stderr: Option<f64>) -> String {
    match stderr {
        Some(stderr) => format!("{value:.4} ± {stderr:.4}"),
        None => format!("{value:.4}"),
    }
}

/// Names come from clients: no markup of theirs.
fn plain(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_alphanumeric() || " .,-_:+=()/".contains(c) {
                c
            } else {
                '?'
            }
        })
        .collect()
}

/// One line a trial.
pub fn csv(sweep: &Sweep) -> String {
    let mut out =
        String::from("trial,shares,origin,alpha,seed,score,stderr,dropped,seconds,system_fingerprint");
    for part in ["dev", "test"] {
        for index in 0..sweep.tasks.len() {
            let _ = write!(out, ",{part}_{index},{part}_{index}_stderr");
        }
    }
    out.push('\n');
    for trial in &sweep.trials {
        line(&mut out, sweep, trial);
    }
    out
}

fn line(out: &mut String, sweep: &Sweep, trial: &Trial) {
    let (name, alpha, seed) = match &trial.origin {
        Origin::Plain => ("plain", String::new(), String::new()),
        Origin::Baseline => ("baseline", String::new(), String::new()),
        Origin::Draw { alpha, seed } => ("draw", alpha.to_string(), seed.to_string()),
        Origin::Grid => ("grid", String::new(), String::new()),
        Origin::Bayes => ("bayes", String::new(), String::new()),
        Origin::Cma { .. } => ("cma", String::new(), String::new()),
    };
    let or_empty = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
    let _ = write!(
        out,
        "{},{},{name},{alpha},{seed},{},{},{},{:.3},{}",
        trial.n,
        trial.label().replace(',', " "),
        or_empty(trial.score),
        or_empty(trial.stderr),
        trial.dropped,
        trial.seconds,
        trial.system_fingerprint.as_deref().unwrap_or_default()
    );
    for metrics in [&trial.dev, &trial.test] {
        for index in 0..sweep.tasks.len() {
            let metric = metrics.get(index);
            let _ = write!(
                out,
                ",{},{}",
                or_empty(metric.map(|metric| metric.value)),
                or_empty(metric.and_then(|metric| metric.stderr))
            );
        }
    }
    out.push('\n');
}
