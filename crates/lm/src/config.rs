//! config.json of the four supported families as one checked type. Defaults are those of transformers'
//! configuration classes; whatever would change the numbers and is not done here is refused by name.

mod rope;

use serde_json::{Map, Value};

use crate::LmError;
use crate::rope::RopeScaling;

pub(crate) const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";

/// The families that share one decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Architecture {
    /// The class name transformers gives the model.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    fn read(config: &Map<String, Value>) -> Result<Self, LmError> {
        let class = config
            .get("architectures")
            .and_then(|list| list.get(0))
            .and_then(Value::as_str);
        let kind = config.get("model_type").and_then(Value::as_str);
        match (class, kind) {
            (Some("LlamaForCausalLM"), _) | (None, Some("llama")) => Ok(Self::Llama),
            (Some("MistralForCausalLM"), _) | (None, Some("mistral")) => Ok(Self::Mistral),
            (Some("Qwen2ForCausalLM"), _) | (None, Some("qwen2")) => Ok(Self::Qwen2),
            (Some("Qwen3ForCausalLM"), _) | (None, Some("qwen3")) => Ok(Self::Qwen3),
            (name, kind) => Err(LmError::UnsupportedArchitecture {
                name: printable(name.or(kind).unwrap_or("(none named)")),
            }),
        }
    }
}

/// What the decoder needs to know of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub tie_word_embeddings: bool,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention output projection.
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// RMS norms of each query and key head before the rotary embedding (Qwen3).
    pub qk_norm: bool,
    /// For each layer, the number of latest positions a token sees (itself included), or None for all.
    pub windows: Vec<Option<usize>>,
    /// End-of-sequence ids of config.json; generation_config.json goes before them.
    pub eos_ids: Vec<u32>,
}

impl ModelConfig {
    /// Checks config.json. Errors name the field.
    pub fn from_json(config: &Map<String, Value>) -> Result<Self, LmError> {
        let architecture = Architecture::read(config)?;
        refuse_unsupported(config)?;
        let fields = Fields(config);
        let hidden_size = fields.size("hidden_size", 1 << 17, None)?;
        let num_layers = fields.size("num_hidden_layers", 1024, None)?;
        let num_heads = fields.size("num_attention_heads", 1024, None)?;
        let num_kv_heads = num_kv_heads(&fields, architecture, num_heads)?;
        let head_dim = head_dim(&fields, architecture, hidden_size, num_heads)?;
        let (qkv_bias, o_bias, mlp_bias) = match architecture {
            Architecture::Llama => {
                let attention = fields.flag("attention_bias", false)?;
                (attention, attention, fields.flag("mlp_bias", false)?)
            }
            Architecture::Mistral => (false, false, false),
            Architecture::Qwen2 => (true, false, false),
            Architecture::Qwen3 => {
                let attention = fields.flag("attention_bias", false)?;
                (attention, attention, false)
            }
        };
        let max_position_default = match architecture {
            Architecture::Llama => 2048,
            Architecture::Mistral => 131_072,
            Architecture::Qwen2 | Architecture::Qwen3 => 32_768,
        };
        let max_position_embeddings =
            fields.size("max_position_embeddings", 1 << 24, Some(max_position_default))?;
        let (rope_theta, rope_scaling) = rope::read(&fields, max_position_embeddings)?;
        Ok(Self {
            architecture,
            vocab_size: fields.size("vocab_size", 1 << 22, None)?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", 1 << 20, None)?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position_embeddings,
            rms_norm_eps: fields.positive("rms_norm_eps", 1e-6)?,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            qkv_bias,
            o_bias,
            mlp_bias,
            qk_norm: architecture == Architecture::Qwen3,
            windows: windows(&fields, architecture, num_layers)?,
            eos_ids: token_ids(config, "eos_token_id").unwrap_or_default(),
        })
    }

    /// Queries that share one key and value head.
    pub fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }
}

/// One id or a list of ids under `key`, as both config.json and generation_config.json write them.
pub(crate) fn token_ids(config: &Map<String, Value>, key: &str) -> Option<Vec<u32>> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get(key)? {
        Value::Array(items) => items.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    }
}

struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    /// A field that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str, max: usize, default: Option<usize>) -> Result<usize, LmError> {
        let Some(value) = self.get(key) else {
            return default.ok_or_else(|| LmError::config(key, "is missing"));
        };
        value
            .as_u64()
            .and_then(|v| usize::try_from(v).ok())
            .filter(|v| (1..=max).contains(v))
            .ok_or_else(|| {
                let detail = format!("must be an integer from 1 to {max}, not {}", shown(value));
                LmError::config(key, detail)
            })
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, LmError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(LmError::config(
                key,
                format!("must be true or false, not {}", shown(other)),
            )),
        }
    }

    fn positive(&self, key: &str, default: f64) -> Result<f64, LmError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|v| v.is_finite() && *v > 0.0)
                .ok_or_else(|| {
                    LmError::config(key, format!("must be a number above 0, not {}", shown(value)))
                }),
        }
    }
}

fn refuse_unsupported(config: &Map<String, Value>) -> Result<(), LmError> {
    let activation = config.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
    if !matches!(activation, "silu" | "swish") {
        let detail = format!("{} is not supported (only silu)", printable(activation));
        return Err(LmError::config("hidden_act", detail));
    }
    for key in ["quantization_config", "compression_config"] {
        if config.get(key).is_some_and(|v| !v.is_null()) {
            return Err(LmError::config(key, "quantised weights are not supported"));
        }
    }
    whole_heads(config)
}

/// Rotating only a part of each head is not done here.
fn whole_heads(table: &Map<String, Value>) -> Result<(), LmError> {
    const KEY: &str = "partial_rotary_factor";
    match table.get(KEY) {
        None | Some(Value::Null) => Ok(()),
        Some(value) if value.as_f64() == Some(1.0) => Ok(()),
        Some(_) => Err(LmError::config(KEY, "only 1.0 is supported")),
    }
}

fn num_kv_heads(fields: &Fields, architecture: Architecture, num_heads: usize) -> Result<usize, LmError> {
    const KEY: &str = "num_key_value_heads";
    // An absent field means the class default; an explicit null means one per query head.
    let default = match (fields.0.contains_key(KEY), architecture) {
        (true, _) | (false, Architecture::Llama) => num_heads,
        (false, Architecture::Mistral) => 8,
        (false, Architecture::Qwen2 | Architecture::Qwen3) => 32,
    };
    let kv_heads = fields.size(KEY, num_heads, Some(default))?;
    if !num_heads.is_multiple_of(kv_heads) {
        let detail = format!("{kv_heads} does not divide num_attention_heads = {num_heads}");
        return Err(LmError::config(KEY, detail));
    }
    Ok(kv_heads)
}

fn head_dim(
    fields: &Fields,
    architecture: Architecture,
    hidden_size: usize,
    num_heads: usize,
) -> Result<usize, LmError> {
    let explicit = match (fields.get("head_dim"), architecture) {
        (Some(_), _) => Some(fields.size("head_dim", 1024, None)?),
        (None, Architecture::Qwen3) if !fields.0.contains_key("head_dim") => Some(128),
        (None, _) => None,
    };
    let head_dim = match explicit {
        Some(dim) => dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let detail = format!("{num_heads} does not divide hidden_size = {hidden_size}");
            return Err(LmError::config("num_attention_heads", detail));
        }
    };
    if !head_dim.is_multiple_of(2) || head_dim > 1024 {
        let detail = format!("{head_dim} must be even and at most 1024");
        return Err(LmError::config("head_dim", detail));
    }
    Ok(head_dim)
}

/// The attention window of each layer. Mistral slides everywhere; Qwen only from `max_window_layers` on (or as
/// `layer_types` says), and only if `use_sliding_window`.
fn windows(
    fields: &Fields,
    architecture: Architecture,
    layers: usize,
) -> Result<Vec<Option<usize>>, LmError> {
    let size = |default: Option<usize>| match fields.0.get("sliding_window") {
        Some(Value::Null) => Ok(None),
        None => Ok(default),
        Some(_) => fields.size("sliding_window", 1 << 31, None).map(Some),
    };
    let (window, from) = match architecture {
        Architecture::Llama => (None, 0),
        Architecture::Mistral => (size(Some(4096))?, 0),
        Architecture::Qwen2 | Architecture::Qwen3 => match fields.flag("use_sliding_window", false)? {
            false => (None, 0),
            true => (size(Some(4096))?, count(fields, "max_window_layers", 28)?),
        },
    };
    let Some(types) = fields.get("layer_types") else {
        return Ok((0..layers)
            .map(|layer| window.filter(|_| layer >= from))
            .collect());
    };
    let bad = |detail: &str| LmError::config("layer_types", detail);
    let types = types.as_array().ok_or_else(|| bad("must be a list"))?;
    if types.len() != layers {
        return Err(bad("must have one entry a layer"));
    }
    let kinds = types.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => match window {
            Some(window) => Ok(Some(window)),
            None => Err(bad("has sliding_attention, but no sliding_window is in use")),
        },
        _ => Err(bad("only full_attention and sliding_attention are supported")),
    });
    kinds.collect()
}

fn count(fields: &Fields, key: &str, default: usize) -> Result<usize, LmError> {
    match fields.get(key) {
        None => Ok(default),
        Some(value) => value
            .as_u64()
            .and_then(|v| usize::try_from(v).ok())
            .ok_or_else(|| LmError::config(key, format!("must be a count, not {}", shown(value)))),
    }
}

fn shown(value: &Value) -> String {
    printable(&value.to_string())
}

/// Text of a stranger's file, short and without control characters.
fn printable(text: &str) -> String {
    text.chars()
        .take(80)
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
