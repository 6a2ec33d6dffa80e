//! The sparsifier and the ranges of its numbers.

use serde_json::Value;

use crate::RecipeError;
use crate::recipe::{Amount, Drops, Rescale, Sparsify};
use crate::setting::Setting;
use crate::spec::SparsifySpec;

pub(super) fn sparsifier(
    spec: Option<&SparsifySpec>,
    wanted: Option<Drops>,
) -> Result<Option<Sparsify>, RecipeError> {
    let spec = match (spec, wanted) {
        (None, None) => return Ok(None),
        (None, Some(drops)) => {
            let detail = format!("is required: {{\"kind\": {:?}, ...}}", drops.name());
            return Err(RecipeError::new("sparsify", detail));
        }
        (Some(spec), _) => spec,
    };
    let drops = [Drops::Dare, Drops::Magnitude, Drops::Della, Drops::Breadcrumbs]
        .into_iter()
        .find(|drops| drops.name() == spec.kind)
        .ok_or_else(|| RecipeError::new("sparsify.kind", "must be dare, magnitude, della or breadcrumbs"))?;
    if wanted.is_some_and(|wanted| wanted != drops) {
        return Err(RecipeError::new(
            "sparsify.kind",
            "is not the one that the method is named for",
        ));
    }
    let only = |given: bool, field: &str, drops_with: &[Drops]| match given && !drops_with.contains(&drops) {
        false => Ok(()),
        true => {
            let names: Vec<&str> = drops_with.iter().map(|d| d.name()).collect();
            let detail = format!("is a field of {} only", names.join(" and "));
            Err(RecipeError::new(format!("sparsify.{field}"), detail))
        }
    };
    only(spec.epsilon.is_some(), "epsilon", &[Drops::Della])?;
    only(spec.window.is_some(), "window", &[Drops::Della])?;
    only(spec.gamma.is_some(), "gamma", &[Drops::Breadcrumbs])?;
    only(spec.seed.is_some(), "seed", &[Drops::Dare, Drops::Della])?;
    let rescale = match &spec.rescale {
        None if drops.is_random() => Rescale::Expectation,
        None | Some(Value::Bool(false)) => Rescale::Off,
        Some(Value::Bool(true)) if drops.is_random() => Rescale::Expectation,
        Some(Value::String(s)) if s == "l1" => Rescale::L1,
        Some(_) if drops.is_random() => {
            return Err(RecipeError::new(
                "sparsify.rescale",
                "must be true, false or \"l1\"",
            ));
        }
        Some(_) => return Err(RecipeError::new("sparsify.rescale", "must be false or \"l1\"")),
    };
    let amount = match (&spec.drop_rate, &spec.retain) {
        (Some(rate), None) => Amount::Drop(rate.clone()),
        (None, Some(share)) => Amount::Retain(share.clone()),
        (None, None) => return Err(RecipeError::new("sparsify.drop_rate", "is required")),
        (Some(_), Some(_)) => {
            return Err(RecipeError::new(
                "sparsify.retain",
                "give drop_rate or retain, not both",
            ));
        }
    };
    let epsilon = match (&spec.epsilon, spec.window) {
        (Some(_), Some(_)) => return Err(RecipeError::new("sparsify.window", "is 2 epsilon; give one")),
        (Some(epsilon), None) => epsilon.clone(),
        (None, Some(window)) => (window / 2.0).into(),
        (None, None) => 0.15.into(),
    };
    let gamma = spec.gamma.clone().unwrap_or(0.01.into());
    amounts("sparsify", drops, &amount, &epsilon, &gamma)?;
    Ok(Some(Sparsify {
        drops,
        amount,
        rescale,
        epsilon,
        gamma,
        seed: spec.seed.unwrap_or(0),
    }))
}

/// Below it nothing is kept of any tensor, and what is divided by it overflows.
const LEAST_RETAINED: f64 = 1e-9;

/// Ranges of a sparsifier's numbers.
pub(super) fn amounts(
    field: &str,
    drops: Drops,
    amount: &Amount,
    epsilon: &Setting,
    gamma: &Setting,
) -> Result<(), RecipeError> {
    let (key, retained): (&str, Vec<f64>) = match amount {
        Amount::Drop(rate) => {
            if !rate.numbers().all(|p| (0.0..1.0).contains(&p)) {
                return Err(RecipeError::new(
                    format!("{field}.drop_rate"),
                    "must be at least 0 and below 1",
                ));
            }
            ("drop_rate", rate.numbers().map(|p| 1.0 - p).collect())
        }
        Amount::Retain(share) => {
            if !share.numbers().all(|r| (LEAST_RETAINED..=1.0).contains(&r)) {
                return Err(RecipeError::new(
                    format!("{field}.retain"),
                    format!("must be at least {LEAST_RETAINED:e} and at most 1"),
                ));
            }
            ("retain", share.numbers().collect())
        }
    };
    let inside = |v: f64| v > 0.0 && v < 1.0;
    match drops {
        // A share of 1 keeps everything, whatever epsilon is (as in mergekit).
        Drops::Della => {
            let sound = epsilon.numbers().all(|e| e >= 0.0)
                && retained
                    .iter()
                    .filter(|r| **r < 1.0)
                    .all(|r| epsilon.numbers().all(|e| inside(r - e) && inside(r + e)));
            match sound {
                true => Ok(()),
                false => Err(RecipeError::new(
                    format!("{field}.{}", if field == "sparsify" { "epsilon" } else { key }),
                    "della keeps with probabilities from retain - epsilon to retain + epsilon: both must lie between 0 and 1",
                )),
            }
        }
        Drops::Breadcrumbs if !gamma.numbers().all(|g| (0.0..1.0).contains(&g)) => Err(RecipeError::new(
            format!("{field}.gamma"),
            "must be at least 0 and below 1",
        )),
        _ => Ok(()),
    }
}
