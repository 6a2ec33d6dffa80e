//! The contribution ratio: given, or drawn.

use crate::RecipeError;
use crate::mixup::{draw_lambda, draw_shares};
use crate::recipe::{Mixup, Shares};
use crate::spec::MixupSpec;

/// Methods that take a contribution ratio.
const MIXABLE: &[&str] = &[
    "average",
    "task_arithmetic",
    "ties",
    "slerp",
    "nuslerp",
    "multislerp",
];

/// Draws this near are one.
const SAME_DRAW: f64 = 1e-12;

pub(super) fn mixup(
    spec: &MixupSpec,
    name: &str,
    models: usize,
    draw_seed: &mut dyn FnMut() -> u64,
) -> Result<Mixup, RecipeError> {
    if !MIXABLE.contains(&name) {
        let detail = format!("{name} takes no contribution ratio; {} do", MIXABLE.join(", "));
        return Err(RecipeError::new("mixup", detail));
    }
    if models < 2 {
        return Err(RecipeError::new("models", "mixup takes at least two models"));
    }
    let given = spec.lambda.is_some() || spec.shares.is_some();
    if let Some(lambda) = &spec.lambda {
        if models != 2 {
            let detail = "is of two models; give shares or alpha for more";
            return Err(RecipeError::new("mixup.lambda", detail));
        }
        if !lambda.numbers().all(|l| (0.0..=1.0).contains(&l)) {
            return Err(RecipeError::new("mixup.lambda", "must be from 0 to 1"));
        }
    }
    if let Some(shares) = &spec.shares {
        if spec.lambda.is_some() {
            return Err(RecipeError::new(
                "mixup.shares",
                "give lambda or shares, not both",
            ));
        }
        let sound = shares.len() == models && shares.iter().all(|s| (0.0..=1.0).contains(s));
        if !sound || (shares.iter().sum::<f64>() - 1.0).abs() > 1e-6 {
            let detail = "must be one number from 0 to 1 for each model, and sum to 1";
            return Err(RecipeError::new("mixup.shares", detail));
        }
    }
    let Some(alpha) = spec.alpha else {
        if spec.seed.is_some() {
            return Err(RecipeError::new("mixup.seed", "is the seed of alpha's draw"));
        }
        return match (&spec.lambda, &spec.shares) {
            (Some(lambda), _) => Ok(Mixup {
                shares: Shares::Lambda(lambda.clone()),
                drawn: None,
            }),
            (_, Some(shares)) => Ok(Mixup {
                shares: Shares::Each(shares.clone()),
                drawn: None,
            }),
            _ => Err(RecipeError::new(
                "mixup",
                "give alpha (with or without a seed), lambda or shares",
            )),
        };
    };
    if given && spec.seed.is_none() {
        let field = if spec.lambda.is_some() {
            "mixup.lambda"
        } else {
            "mixup.shares"
        };
        return Err(RecipeError::new(field, "give alpha or this, not both"));
    }
    // 2^53: so that a seed survives clients whose numbers are f64.
    let seed = spec.seed.unwrap_or_else(|| draw_seed() & ((1 << 53) - 1));
    let bad_alpha = || RecipeError::new("mixup.alpha", "must be a finite number above 0");
    let shares = match models {
        2 => Shares::Lambda(draw_lambda(alpha, seed).ok_or_else(bad_alpha)?.into()),
        _ => Shares::Each(draw_shares(alpha, seed, models).ok_or_else(bad_alpha)?),
    };
    // What a resolved recipe says of its draw must be the draw, up to what another machine's logarithms differ by. What it
    // says holds.
    let near = |a: f64, b: f64| (a - b).abs() <= SAME_DRAW;
    let resolved = match (&shares, &spec.lambda, &spec.shares) {
        (_, None, None) => Some(shares.clone()),
        (Shares::Lambda(drawn), Some(given), None) => match (drawn.as_constant(), given.as_constant()) {
            (Some(a), Some(b)) if near(a, b) => Some(Shares::Lambda(given.clone())),
            _ => None,
        },
        (Shares::Each(drawn), None, Some(given)) => {
            let same = drawn.len() == given.len() && drawn.iter().zip(given).all(|(a, b)| near(*a, *b));
            same.then(|| Shares::Each(given.clone()))
        }
        _ => None,
    };
    let Some(resolved) = resolved else {
        let field = if spec.lambda.is_some() {
            "mixup.lambda"
        } else {
            "mixup.shares"
        };
        let drawn = match &shares {
            Shares::Lambda(lambda) => lambda.to_json().to_string(),
            Shares::Each(shares) => format!("{shares:?}"),
        };
        return Err(RecipeError::new(
            field,
            format!("alpha and seed draw {drawn}; give one or the other"),
        ));
    };
    Ok(Mixup {
        shares: resolved,
        drawn: Some((alpha, seed)),
    })
}
