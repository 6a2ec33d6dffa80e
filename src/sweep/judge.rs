//! What the outcomes of trials say of each other.

use super::{Select, Sweep, Trial, Verdict};
use crate::eval::{Metric, Outcome, TaskRecord, mean, measure, value};

/// Standard errors by which a trial must be behind to be dropped.
const CLEARLY: f64 = 2.5;
/// The dev items that there must be at least.
const LEAST_HEAT: usize = 20;

/// The outcomes of a model by task.
pub(super) type Found = Vec<Vec<Outcome>>;

/// Scores of several tasks as one number, higher being better, with its standard error.
pub(super) fn selected(
    select: Select,
    tasks: &[TaskRecord],
    metrics: &[Metric],
) -> Option<(f64, Option<f64>)> {
    if metrics.is_empty() || metrics.len() != tasks.len() {
        return None;
    }
    let signed = tasks
        .iter()
        .zip(metrics)
        .map(|(task, metric)| (task.sign() * metric.value, metric.stderr));
    let signed: Vec<(f64, Option<f64>)> = signed.collect();
    match select {
        Select::Mean => {
            let n = signed.len() as f64;
            let squares: Option<f64> = signed.iter().map(|(_, stderr)| stderr.map(|s| s * s)).sum();
            Some((
                signed.iter().map(|(value, _)| value).sum::<f64>() / n,
                squares.map(|squares| squares.sqrt() / n),
            ))
        }
        Select::Min => signed
            .into_iter()
            .reduce(|worst, other| if other.0 < worst.0 { other } else { worst }),
    }
}

/// Without a spread there is nothing to tell by.
pub(super) fn is_noise(gain: f64, stderr: Option<f64>) -> bool {
    !stderr.is_some_and(|stderr| stderr > 0.0 && gain.abs() >= 2.0 * stderr)
}

/// What scores from outside say: the gain is that of the scores themselves.
pub(super) fn of_scores(sweep: &Sweep, winner: usize, baseline: usize) -> Verdict {
    let of = |n: usize| {
        sweep
            .trials
            .get(n)
            .map_or((0.0, None), |t| (t.score.unwrap_or(0.0), t.stderr))
    };
    let ((a, a_stderr), (b, b_stderr)) = (of(winner), of(baseline));
    let stderr = a_stderr.zip(b_stderr).map(|(a, b)| (a * a + b * b).sqrt());
    Verdict {
        winner,
        baseline,
        test_gain: a - b,
        test_gain_stderr: stderr,
        within_noise: is_noise(a - b, stderr),
        pareto: match sweep.tasks.is_empty() {
            true => vec![winner],
            false => pareto(sweep),
        },
    }
}

pub(super) fn metrics(sweep: &Sweep, found: &Found) -> Result<Vec<Metric>, String> {
    let each = sweep.tasks.iter().zip(found).map(|(task, outcomes)| {
        let outcomes: Vec<&Outcome> = outcomes.iter().collect();
        let metric = measure(&task.metric, &outcomes)
            .filter(|metric| metric.value.is_finite() && metric.stderr.is_none_or(f64::is_finite));
        metric.ok_or_else(|| format!("{} has no finite {}", task.name, task.metric))
    });
    each.collect()
}

/// How much better `ours` is, in the sweep's score, and the standard error of that. Items are compared with themselves where
/// the metric is a mean over items.
pub(super) fn gain(sweep: &Sweep, ours: &Found, theirs: &Found) -> (f64, Option<f64>) {
    let both = || sweep.tasks.iter().zip(ours.iter().zip(theirs));
    let of = |found: &Found| {
        metrics(sweep, found)
            .ok()
            .and_then(|m| selected(sweep.select, &sweep.tasks, &m))
    };
    let (Some((a, a_stderr)), Some((b, b_stderr))) = (of(ours), of(theirs)) else {
        return (0.0, None);
    };
    let apart = a_stderr.zip(b_stderr).map(|(a, b)| (a * a + b * b).sqrt());
    let paired: Option<f64> = match sweep.select {
        // Which task is the worst may differ.
        Select::Min => None,
        Select::Mean => both()
            .map(|(task, (ours, theirs))| {
                let sign = task.sign();
                let differences: Option<Vec<f64>> = ours
                    .iter()
                    .zip(theirs)
                    .map(|(a, b)| Some(sign * (value(&task.metric, a)? - value(&task.metric, b)?)))
                    .collect();
                mean(&differences?)?.stderr.map(|stderr| stderr * stderr)
            })
            .sum(),
    };
    let stderr = paired.map(|squares| squares.sqrt() / sweep.tasks.len() as f64);
    (a - b, stderr.or(apart))
}

pub(super) fn is_clearly_worse(sweep: &Sweep, found: &Found, leader: Option<&(f64, Found)>) -> bool {
    let Some((_, leader)) = leader else {
        return false;
    };
    if found.iter().map(Vec::len).sum::<usize>() < LEAST_HEAT {
        return false;
    }
    // The leader's first items are the same ones.
    let same: Found = leader
        .iter()
        .zip(found)
        .map(|(l, f)| l[..f.len().min(l.len())].to_vec())
        .collect();
    match gain(sweep, found, &same) {
        (gain, Some(stderr)) if stderr > 0.0 => gain + CLEARLY * stderr < 0.0,
        _ => false,
    }
}

/// Trials that no other one beats on every task.
pub(super) fn pareto(sweep: &Sweep) -> Vec<usize> {
    let signed = |trial: &Trial| -> Vec<f64> {
        let values = sweep.tasks.iter().zip(&trial.dev);
        values.map(|(task, metric)| task.sign() * metric.value).collect()
    };
    let scored: Vec<(usize, Vec<f64>)> = sweep
        .trials
        .iter()
        .filter(|trial| trial.score.is_some())
        .map(|trial| (trial.n, signed(trial)))
        .collect();
    let beats =
        |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| a >= b) && a.iter().zip(b).any(|(a, b)| a > b);
    let free = scored
        .iter()
        .filter(|(_, own)| !scored.iter().any(|(_, other)| beats(other, own)));
    free.map(|(n, _)| *n).collect()
}
