//! The rotary fields of config.json, old and new.

use serde_json::{Map, Value};

use super::{Architecture, Fields, printable};
use crate::LmError;
use crate::rope::{RopeConfig, RopeScaling};

const NEW: &str = "rope_parameters";
const OLD: &str = "rope_scaling";
const ORIGINAL_LENGTH: &str = "original_max_position_embeddings";

/// The rotary embeddings that a model's layers choose from: one, or for Gemma 3 that of the layers with full attention
/// and that of the others.
pub(super) fn read(
    fields: &Fields,
    architecture: Architecture,
    head_dim: usize,
    max_position: usize,
) -> Result<Vec<RopeConfig>, LmError> {
    let reader = Reader {
        fields,
        architecture,
        head_dim,
        max_position,
    };
    let theta = architecture.defaults().rope_theta;
    let (new, old) = (fields.get(NEW), fields.get(OLD));
    if architecture != Architecture::Gemma3 {
        // transformers: `rope_scaling or rope_parameters`.
        let is_empty = |table: &Value| table.as_object().is_some_and(Map::is_empty);
        let (key, table) = match old.filter(|table| !is_empty(table)) {
            Some(table) => (OLD, Some(table)),
            None => (NEW, new),
        };
        return Ok(vec![reader.one(key, table, "rope_theta", theta)?]);
    }
    let of = |kind: &str| new.and_then(|table| table.get(kind));
    // Here transformers writes the old one over the new one.
    let (key, full) = match (of("full_attention"), old) {
        (full, None) => ("rope_parameters.full_attention", full.cloned()),
        (Some(Value::Object(full)), Some(Value::Object(old))) => {
            let both = full
                .iter()
                .chain(old)
                .map(|(key, value)| (key.clone(), value.clone()));
            (OLD, Some(Value::Object(both.collect())))
        }
        (_, Some(old)) => (OLD, Some(old.clone())),
    };
    let (local_key, local) = ("rope_parameters.sliding_attention", of("sliding_attention"));
    Ok(vec![
        reader.one(key, full.as_ref(), "rope_theta", theta)?,
        reader.one(local_key, local, "rope_local_base_freq", 10_000.0)?,
    ])
}

struct Reader<'a> {
    fields: &'a Fields<'a>,
    architecture: Architecture,
    head_dim: usize,
    max_position: usize,
}

impl Reader<'_> {
    /// `table` is config.json's `key`; the frequencies' base is in it or in the config itself.
    fn one(
        &self,
        key: &str,
        table: Option<&Value>,
        theta_key: &str,
        theta: f64,
    ) -> Result<RopeConfig, LmError> {
        let empty = Map::new();
        let values = match table.filter(|v| !v.is_null()) {
            None => &empty,
            Some(table) => table
                .as_object()
                .ok_or_else(|| LmError::config(key, "must be an object"))?,
        };
        let table = Table { key, values };
        let theta = match table.number("rope_theta")? {
            Some(theta) => theta,
            None => self.fields.positive(theta_key, theta)?,
        };
        let dim = self.rotated_dims(&table)?;
        Ok(RopeConfig {
            theta,
            dim,
            scaling: self.scaling(&table, dim)?,
        })
    }

    /// Only Phi-3 rotates a part of each head, the first dimensions.
    fn rotated_dims(&self, table: &Table<'_>) -> Result<usize, LmError> {
        const KEY: &str = "partial_rotary_factor";
        let share = match table.number(KEY)? {
            Some(share) => share,
            None => self.fields.positive(KEY, 1.0)?,
        };
        let dim = (self.head_dim as f64 * share) as usize;
        match self.architecture {
            _ if share == 1.0 => Ok(self.head_dim),
            Architecture::Phi3 if share < 1.0 && dim > 0 && dim.is_multiple_of(2) => Ok(dim),
            Architecture::Phi3 => Err(LmError::config(
                KEY,
                "must leave an even number of dimensions of each head",
            )),
            _ => Err(LmError::config(KEY, "only 1.0 is supported")),
        }
    }

    fn scaling(&self, table: &Table<'_>, dim: usize) -> Result<RopeScaling, LmError> {
        let kind = table.values.get("rope_type").or(table.values.get("type"));
        let Some(kind) = kind.filter(|v| !v.is_null()) else {
            return Ok(RopeScaling::Default);
        };
        Ok(match (kind.as_str(), self.architecture) {
            (Some("default"), _) => RopeScaling::Default,
            // Names that Phi-3's first configs had for longrope.
            (Some("longrope"), _) | (Some("su" | "yarn"), Architecture::Phi3) => self.longrope(table, dim)?,
            (Some("linear"), _) => RopeScaling::Linear {
                factor: table.required("factor")? as f32,
            },
            (Some("llama3"), _) => {
                let (low, high) = (
                    table.required("low_freq_factor")?,
                    table.required("high_freq_factor")?,
                );
                if high <= low {
                    return Err(table.error("high_freq_factor", "must be above low_freq_factor"));
                }
                RopeScaling::Llama3 {
                    factor: table.required("factor")? as f32,
                    low_freq_factor: low as f32,
                    high_freq_factor: high as f32,
                    original_max_position: table.required(ORIGINAL_LENGTH)? as f32,
                }
            }
            (Some("dynamic"), _) => RopeScaling::Dynamic {
                factor: table.required("factor")? as f32,
            },
            (Some("yarn"), _) => self.yarn(table)?,
            (other, _) => {
                let name = printable(other.unwrap_or("(not a string)"));
                let detail = format!(
                    "{name} is not supported (supported: default, linear, dynamic, yarn, llama3, longrope)"
                );
                return Err(table.error("rope_type", &detail));
            }
        })
    }

    /// The length of pre-training, if it is told: in the config itself or in the table.
    fn original_length(&self, table: &Table<'_>) -> Result<Option<f64>, LmError> {
        // Phi-3's class has a default for the config's, which goes before the table's.
        let default = (self.architecture == Architecture::Phi3).then_some(4096);
        match (self.fields.get(ORIGINAL_LENGTH), default) {
            (None, None) => table.number(ORIGINAL_LENGTH),
            _ => Ok(Some(self.fields.size(ORIGINAL_LENGTH, 1 << 24, default)? as f64)),
        }
    }

    /// As transformers, `_compute_longrope_parameters`.
    fn longrope(&self, table: &Table<'_>, dim: usize) -> Result<RopeScaling, LmError> {
        let Some(length) = self.original_length(table)? else {
            return Err(table.error(ORIGINAL_LENGTH, "is missing"));
        };
        if length < 2.0 || length.fract() != 0.0 {
            return Err(table.error(ORIGINAL_LENGTH, "must be an integer above 1"));
        }
        const SHORT: &str = "short_factor";
        let numbers = table.values.get(SHORT).and_then(Value::as_array).map(|list| {
            let number = |v: &Value| v.as_f64().filter(|v| v.is_finite() && *v > 0.0);
            list.iter().map_while(number).map(|v| v as f32).collect()
        });
        let short_factors: Vec<f32> = numbers.unwrap_or_default();
        if short_factors.len() != dim / 2 {
            let detail = format!("must be a list of {} numbers above 0", dim / 2);
            return Err(table.error(SHORT, &detail));
        }
        let factor = table
            .number("factor")?
            .unwrap_or(self.max_position as f64 / length);
        let attention_factor = match table.number("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / length.ln()).sqrt(),
        };
        Ok(RopeScaling::LongRope {
            short_factors,
            original_max_position: length as usize,
            attention_factor: attention_factor as f32,
        })
    }

    /// Defaults as in transformers, `_compute_yarn_parameters`.
    fn yarn(&self, table: &Table<'_>) -> Result<RopeScaling, LmError> {
        let length = self.original_length(table)?.unwrap_or(self.max_position as f64);
        let factor = table.required("factor")?;
        let (fast, slow) = (
            table.number("beta_fast")?.unwrap_or(32.0),
            table.number("beta_slow")?.unwrap_or(1.0),
        );
        if fast < slow {
            return Err(table.error("beta_fast", "must not be below beta_slow"));
        }
        let mscale = |weight: f64| match factor <= 1.0 {
            true => 1.0,
            false => 0.1 * weight * factor.ln() + 1.0,
        };
        let attention_factor = match (
            table.number("attention_factor")?,
            table.number("mscale")?,
            table.number("mscale_all_dim")?,
        ) {
            (Some(given), _, _) => given,
            (None, Some(own), Some(all)) => mscale(own) / mscale(all),
            (None, _, _) => mscale(1.0),
        };
        let truncate = match table.values.get("truncate") {
            None | Some(Value::Null) => true,
            Some(Value::Bool(truncate)) => *truncate,
            Some(_) => return Err(table.error("truncate", "must be true or false")),
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
}

/// One object of rotary fields.
struct Table<'a> {
    key: &'a str,
    values: &'a Map<String, Value>,
}

impl Table<'_> {
    fn error(&self, name: &str, detail: &str) -> LmError {
        LmError::config(&format!("{}.{name}", self.key), detail)
    }

    fn number(&self, name: &str) -> Result<Option<f64>, LmError> {
        match self.values.get(name).filter(|v| !v.is_null()) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|v| v.is_finite() && *v > 0.0) {
                Some(number) => Ok(Some(number)),
                None => Err(self.error(name, "must be a number above 0")),
            },
        }
    }

    fn required(&self, name: &str) -> Result<f64, LmError> {
        self.number(name)?
            .ok_or_else(|| self.error(name, "must be a number above 0"))
    }
}
