//! The rotary fields of config.json, old and new.

use serde_json::{Map, Value};

use super::{Fields, printable, whole_heads};
use crate::LmError;
use crate::rope::RopeScaling;

/// `rope_theta` and `rope_scaling`, or `rope_parameters`, which newer configs have in their stead.
pub(super) fn read(fields: &Fields, max_position: usize) -> Result<(f64, RopeScaling), LmError> {
    let (key, table) = match (fields.get("rope_parameters"), fields.get("rope_scaling")) {
        (Some(table), _) => ("rope_parameters", table),
        (None, Some(table)) => ("rope_scaling", table),
        (None, None) => return Ok((fields.positive("rope_theta", 10_000.0)?, RopeScaling::Default)),
    };
    let table = table
        .as_object()
        .ok_or_else(|| LmError::config(key, "must be an object"))?;
    let named = |name: &str| format!("{key}.{name}");
    let number = |name: &str| {
        table
            .get(name)
            .and_then(Value::as_f64)
            .filter(|v| v.is_finite() && *v > 0.0)
            .ok_or_else(|| LmError::config(&named(name), "must be a number above 0"))
    };
    let theta = match table.get("rope_theta") {
        Some(_) => number("rope_theta")?,
        None => fields.positive("rope_theta", 10_000.0)?,
    };
    whole_heads(table)?;
    let kind = table.get("rope_type").or(table.get("type"));
    let scaling = match kind.and_then(Value::as_str) {
        None if kind.is_none() => RopeScaling::Default,
        Some("default") => RopeScaling::Default,
        Some("linear") => RopeScaling::Linear {
            factor: number("factor")? as f32,
        },
        Some("llama3") => {
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            if high <= low {
                return Err(LmError::config(
                    &named("high_freq_factor"),
                    "must be above low_freq_factor",
                ));
            }
            RopeScaling::Llama3 {
                factor: number("factor")? as f32,
                low_freq_factor: low as f32,
                high_freq_factor: high as f32,
                original_max_position: number("original_max_position_embeddings")? as f32,
            }
        }
        Some("dynamic") => RopeScaling::Dynamic {
            factor: number("factor")? as f32,
        },
        Some("yarn") => yarn(fields, table, key, max_position)?,
        other => {
            let name = printable(other.unwrap_or("(not a string)"));
            return Err(LmError::config(
                &named("rope_type"),
                format!("{name} is not supported (supported: default, linear, dynamic, yarn, llama3)"),
            ));
        }
    };
    Ok((theta, scaling))
}

/// Defaults as in transformers, `_compute_yarn_parameters`.
fn yarn(
    fields: &Fields,
    table: &Map<String, Value>,
    key: &str,
    max_position: usize,
) -> Result<RopeScaling, LmError> {
    let named = |name: &str| format!("{key}.{name}");
    let number = |name: &str| match table.get(name).filter(|v| !v.is_null()) {
        None => Ok(None),
        Some(value) => match value.as_f64().filter(|v| v.is_finite() && *v > 0.0) {
            Some(number) => Ok(Some(number)),
            None => Err(LmError::config(&named(name), "must be a number above 0")),
        },
    };
    const LENGTH: &str = "original_max_position_embeddings";
    let length = match (fields.get(LENGTH), number(LENGTH)?) {
        (Some(_), _) => fields.size(LENGTH, 1 << 24, None)? as f64,
        (None, Some(length)) => length,
        (None, None) => max_position as f64,
    };
    let factor =
        number("factor")?.ok_or_else(|| LmError::config(&named("factor"), "must be a number above 0"))?;
    let (fast, slow) = (
        number("beta_fast")?.unwrap_or(32.0),
        number("beta_slow")?.unwrap_or(1.0),
    );
    if fast < slow {
        return Err(LmError::config(
            &named("beta_fast"),
            "must not be below beta_slow",
        ));
    }
    let mscale = |weight: f64| match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * weight * factor.ln() + 1.0,
    };
    let attention_factor = match (
        number("attention_factor")?,
        number("mscale")?,
        number("mscale_all_dim")?,
    ) {
        (Some(given), _, _) => given,
        (None, Some(own), Some(all)) => mscale(own) / mscale(all),
        (None, _, _) => mscale(1.0),
    };
    let truncate = match table.get("truncate") {
        None | Some(Value::Null) => true,
        Some(Value::Bool(truncate)) => *truncate,
        Some(_) => return Err(LmError::config(&named("truncate"), "must be true or false")),
    };
    Ok(RopeScaling::Yarn {
        factor: factor as f32,
        original_max_position: length as f32,
        beta_fast: fast as f32,
        beta_slow: slow as f32,
        truncate,
        attention_factor: attention_factor as f32,
    })
}
