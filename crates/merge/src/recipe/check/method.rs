//! The method and the fields that belong to it.

use crate::RecipeError;
use crate::recipe::{Granularity, Method, Trim};
use crate::setting::Setting;
use crate::spec::RecipeSpec;

const DEFAULT_RETAIN: f64 = 0.5;
/// slerp: beyond it the arc has been gone round.
const MOST_T: f64 = 1000.0;

pub(super) fn method(name: &str, spec: &RecipeSpec, sugar: Option<bool>) -> Result<Method, RecipeError> {
    let scaling = spec.scaling.clone().unwrap_or(1.0.into());
    if scaling.numbers().any(|s| !(s as f32).is_finite()) {
        return Err(RecipeError::new("scaling", "must be a finite number"));
    }
    Ok(match name {
        "average" => Method::Average {
            normalize: spec.normalize.unwrap_or(true),
        },
        "task_arithmetic" => Method::TaskArithmetic {
            scaling,
            normalize: spec.normalize.unwrap_or(false),
        },
        "ties" => ties(spec, scaling, sugar)?,
        "slerp" => Method::Slerp {
            t: slerp_share(spec)?,
        },
        "nuslerp" => Method::NuSlerp {
            granularity: granularity(spec, true)?,
        },
        "multislerp" => Method::MultiSlerp {
            normalize: spec.normalize.unwrap_or(true),
        },
        "karcher" => Method::Karcher {
            max_iter: match spec.max_iter.unwrap_or(10) {
                n @ 1..=10_000 => n,
                _ => return Err(RecipeError::new("max_iter", "must be from 1 to 10000")),
            },
            tolerance: within(
                "tolerance",
                spec.tolerance.unwrap_or(1e-5),
                |v| v > 0.0 && v < 1.0,
                "must be above 0 and below 1",
            )?,
        },
        "model_stock" => Method::ModelStock {
            granularity: granularity(spec, false)?,
        },
        "sce" => Method::Sce {
            select: within(
                "select",
                spec.select.unwrap_or(1.0),
                |v| (0.0..=1.0).contains(&v),
                "must be from 0 to 1",
            )?,
        },
        "nearswap" => Method::NearSwap {
            t: match &spec.t {
                Some(t) if t.numbers().all(|t| t >= 0.0 && (t as f32).is_finite()) => t.clone(),
                Some(_) => return Err(RecipeError::new("t", "must not be negative")),
                None => return Err(RecipeError::new("t", "is required")),
            },
        },
        "arcee_fusion" => Method::ArceeFusion,
        _ => Method::Passthrough,
    })
}

fn ties(spec: &RecipeSpec, scaling: Setting, sugar: Option<bool>) -> Result<Method, RecipeError> {
    // With a sparsifier of its own the method trims nothing more.
    let default_retain = if sugar.is_some() { 1.0 } else { DEFAULT_RETAIN };
    let retain = spec.retain.clone().unwrap_or(default_retain.into());
    if !retain.numbers().all(|r| r > 0.0 && r <= 1.0) {
        return Err(RecipeError::new("retain", "must be above 0 and at most 1"));
    }
    let default_variant = if sugar.is_some() { "tensor" } else { "global" };
    let trim = match spec.variant.as_deref().unwrap_or(default_variant) {
        "global" => Trim::Global {
            retain: retain.as_constant().ok_or_else(|| {
                RecipeError::new(
                    "retain",
                    "the variant global has one threshold over the whole model: one number",
                )
            })?,
        },
        "tensor" => Trim::Tensor { retain },
        _ => return Err(RecipeError::new("variant", "must be global or tensor")),
    };
    let normalize = match (&trim, spec.normalize) {
        (Trim::Global { .. }, Some(false)) => {
            let detail = "the variant global takes the mean over the parents that agree";
            return Err(RecipeError::new("normalize", detail));
        }
        (Trim::Global { .. }, _) => true,
        (Trim::Tensor { .. }, given) => given.or(sugar).unwrap_or(true),
    };
    Ok(Method::Ties {
        scaling,
        trim,
        normalize,
    })
}

fn slerp_share(spec: &RecipeSpec) -> Result<Setting, RecipeError> {
    match (&spec.t, &spec.mixup) {
        (Some(_), Some(_)) => Err(RecipeError::new(
            "t",
            "t and mixup exclude each other: t is 1 - lambda",
        )),
        (Some(t), None) if t.numbers().all(|t| t.abs() <= MOST_T) => Ok(t.clone()),
        (Some(_), None) => Err(RecipeError::new(
            "t",
            format!("must be from -{MOST_T} to {MOST_T}"),
        )),
        // Replaced by 1 - lambda.
        (None, Some(_)) => Ok(0.5.into()),
        (None, None) => Err(RecipeError::new("t", "is required")),
    }
}

fn granularity(spec: &RecipeSpec, columns: bool) -> Result<Granularity, RecipeError> {
    match spec.granularity.as_deref() {
        None | Some("tensor") => Ok(Granularity::Tensor),
        Some("row") => Ok(Granularity::Row),
        Some("column") if columns => Ok(Granularity::Column),
        Some(_) if columns => Err(RecipeError::new("granularity", "must be tensor, row or column")),
        Some(_) => Err(RecipeError::new("granularity", "must be tensor or row")),
    }
}

fn within(field: &str, value: f64, good: impl Fn(f64) -> bool, detail: &str) -> Result<f64, RecipeError> {
    match good(value) {
        true => Ok(value),
        false => Err(RecipeError::new(field, detail)),
    }
}
