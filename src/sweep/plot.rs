//! Score against lambda, as a picture: trials with their standard errors, baselines, and the densities that lambdas were drawn from.

use std::fmt::Write;

use super::plan::{Origin, Search};
use super::{Sweep, Trial};
use crate::serving::Shares;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
/// Left, right, top and bottom of the field.
const FIELD: (f64, f64, f64, f64) = (64.0, 740.0, 40.0, 330.0);
/// Of the strip of densities.
const STRIP: (f64, f64) = (370.0, 420.0);

/// An SVG. For more than two parents the trials lie side by side in their order.
pub fn plot(sweep: &Sweep) -> String {
    let (left, right, top, bottom) = FIELD;
    let two = sweep.parents == 2;
    let count = sweep.trials.len().max(2);
    let place = |trial: &Trial| match two {
        true => trial
            .shares
            .mean_lambda()
            .map(|lambda| left + lambda * (right - left)),
        false => Some(left + trial.n as f64 / (count - 1) as f64 * (right - left)),
    };
    let scored: Vec<(&Trial, f64, f64)> = sweep
        .trials
        .iter()
        .filter_map(|trial| Some((trial, trial.score?, trial.stderr.unwrap_or(0.0))))
        .collect();
    let lowest = scored
        .iter()
        .map(|(_, score, error)| score - error)
        .fold(f64::INFINITY, f64::min);
    let highest = scored
        .iter()
        .map(|(_, score, error)| score + error)
        .fold(f64::NEG_INFINITY, f64::max);
    let (lowest, highest) = match lowest < highest {
        true => (
            lowest - 0.05 * (highest - lowest),
            highest + 0.05 * (highest - lowest),
        ),
        false if lowest.is_finite() => (lowest - 0.5, lowest + 0.5),
        false => (0.0, 1.0),
    };
    let height = |score: f64| bottom - (score - lowest) / (highest - lowest) * (bottom - top);
    let mut out = String::new();
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{left}\" y=\"22\" font-size=\"14\">Score on dev items, {} ({} of {} trials)</text>",
        sweep.search.name(),
        sweep.trials.len(),
        sweep.total
    );
    for step in 0..=5 {
        let score = lowest + f64::from(step) / 5.0 * (highest - lowest);
        let y = height(score);
        let _ = writeln!(
            out,
            "<line x1=\"{left}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{score:.3}</text>",
            left - 6.0,
            y + 4.0
        );
    }
    for step in 0..=10 {
        let x = left + f64::from(step) / 10.0 * (right - left);
        let label = match two {
            true => format!("{:.1}", f64::from(step) / 10.0),
            false => String::new(),
        };
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
            bottom + 16.0
        );
    }
    let axis = match (two, &sweep.search) {
        (true, Search::Cma { .. }) => "lambda, the share of the first model (by layer: the mean)",
        (true, _) => "lambda, the share of the first model",
        (false, _) => "trials in their order",
    };
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{axis}</text>",
        (left + right) / 2.0,
        bottom + 32.0
    );
    for (trial, score, error) in &scored {
        let y = height(*score);
        let Some(x) = place(trial) else {
            let _ = writeln!(
                out,
                "<line x1=\"{left}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#888\" stroke-dasharray=\"5 4\"/>\
                 <text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#666\">plain method</text>",
                y - 4.0
            );
            continue;
        };
        let best = sweep
            .verdict
            .as_ref()
            .is_some_and(|verdict| verdict.winner == trial.n);
        let colour = match (best, trial.origin.is_baseline()) {
            (true, _) => "#c0392b",
            (false, true) => "#888",
            (false, false) => "#2c6fbb",
        };
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"/>\
             <circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{}\" fill=\"{colour}\"><title>{}: {score:.4} ± {error:.4}</title></circle>",
            height(score - error),
            height(score + error),
            if best { 6.0 } else { 4.0 },
            trial.label()
        );
    }
    if two {
        densities(&mut out, sweep);
    }
    out.push_str("</svg>\n");
    out
}

/// Beta(alpha, alpha) of each alpha that was drawn from, up to a common height.
fn densities(out: &mut String, sweep: &Sweep) {
    let alphas = match &sweep.search {
        Search::M3 { alphas, .. } => alphas.clone(),
        Search::Random { alpha, .. } => vec![*alpha],
        Search::Grid { .. } | Search::Bayes { .. } | Search::Cma { .. } => return,
    };
    let (left, right, ..) = FIELD;
    let (top, bottom) = STRIP;
    for alpha in &alphas {
        let log_density = |x: f64| (alpha - 1.0) * (x.ln() + (1.0 - x).ln());
        let points: Vec<(f64, f64)> = (1..100)
            .map(|k| f64::from(k) / 100.0)
            .map(|x| (x, log_density(x)))
            .collect();
        let most = points.iter().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
        let line: Vec<String> = points
            .iter()
            .map(|(x, y)| {
                format!(
                    "{:.1},{:.1}",
                    left + x * (right - left),
                    bottom - (y - most).exp() * (bottom - top)
                )
            })
            .collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"#2c6fbb\" stroke-opacity=\"0.45\"><title>Beta({alpha}, {alpha})</title></polyline>",
            line.join(" ")
        );
    }
    let drawn = sweep
        .trials
        .iter()
        .filter_map(|trial| match (&trial.origin, &trial.shares) {
            (Origin::Draw { .. }, Shares::Lambda(lambda)) => Some(left + lambda * (right - left)),
            _ => None,
        });
    for x in drawn {
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{bottom}\" y2=\"{}\" stroke=\"#2c6fbb\"/>",
            bottom + 6.0
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#666\">densities of lambda</text>",
        left - 6.0,
        bottom
    );
}
