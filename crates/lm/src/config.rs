//! config.json of the supported families as one checked type. Defaults are those of transformers'
//! configuration classes; whatever would change the numbers and is not done here is refused by name.

mod architecture;
mod layers;
mod rope;

pub use architecture::Architecture;
pub(crate) use architecture::SUPPORTED;

use serde_json::{Map, Value};

use crate::LmError;
use crate::rope::{RopeConfig, RopeScaling};

/// What multiplies the second half of the feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// GELU by its tanh approximation (Gemma).
    GeluTanh,
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
    /// Longest text. For Phi-3's longrope that of its short factors: beyond it keys would have to be rotated anew.
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub activation: Activation,
    pub tie_word_embeddings: bool,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention output projection.
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// RMS norms of each query and key head before the rotary embedding (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// One weight for queries, keys and values, and one for gate and up projection (Phi-3).
    pub fused_projections: bool,
    /// RMS norms multiply by `1 + weight`, attention and feed-forward layer are normed once more before they are added,
    /// and embeddings are multiplied by `sqrt(hidden_size)` (Gemma).
    pub gemma_block: bool,
    /// What multiplies the products of queries and keys.
    pub attention_scale: f64,
    /// Attention scores `x` become `cap * tanh(x / cap)` (Gemma 2).
    pub attention_softcap: Option<f32>,
    /// Logits likewise.
    pub logit_softcap: Option<f32>,
    /// For each layer, the number of latest positions a token sees (itself included), or None for all.
    pub windows: Vec<Option<usize>>,
    /// For each layer, the rotary embedding of its queries and keys as an index into `ropes`, or None for none.
    pub layer_ropes: Vec<Option<usize>>,
    pub ropes: Vec<RopeConfig>,
    /// End-of-sequence ids of config.json; generation_config.json goes before them.
    pub eos_ids: Vec<u32>,
}

impl ModelConfig {
    /// Checks config.json. Errors name the field.
    pub fn from_json(config: &Map<String, Value>) -> Result<Self, LmError> {
        let architecture = Architecture::read(config)?;
        let defaults = architecture.defaults();
        let fields = Fields(config);
        fields.refuse_unsupported()?;
        let hidden_size = fields.size("hidden_size", 1 << 17, None)?;
        let num_layers = fields.size("num_hidden_layers", 1024, None)?;
        let num_heads = fields.size("num_attention_heads", 1024, None)?;
        let num_kv_heads = num_kv_heads(&fields, defaults.num_kv_heads, num_heads)?;
        let head_dim = head_dim(&fields, defaults.head_dim, hidden_size, num_heads)?;
        let (attention_bias, mlp_bias) = (
            defaults.has_attention_bias && fields.flag("attention_bias", false)?,
            defaults.has_mlp_bias && fields.flag("mlp_bias", false)?,
        );
        let max_position_embeddings =
            fields.size("max_position_embeddings", 1 << 24, Some(defaults.max_position))?;
        let windows = layers::windows(&fields, architecture, num_layers)?;
        let ropes = rope::read(&fields, architecture, head_dim, max_position_embeddings)?;
        let gemma = architecture.is_gemma();
        Ok(Self {
            architecture,
            vocab_size: fields.size("vocab_size", 1 << 22, None)?,
            hidden_size,
            intermediate_size: fields.size("intermediate_size", 1 << 20, None)?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position_embeddings: match &ropes[0].scaling {
                RopeScaling::LongRope {
                    original_max_position,
                    ..
                } => max_position_embeddings.min(*original_max_position),
                _ => max_position_embeddings,
            },
            rms_norm_eps: fields.positive("rms_norm_eps", defaults.rms_norm_eps)?,
            activation: activation(&fields, gemma)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings", defaults.tie_word_embeddings)?,
            qkv_bias: attention_bias || architecture == Architecture::Qwen2,
            o_bias: attention_bias,
            mlp_bias,
            qk_norm: matches!(architecture, Architecture::Qwen3 | Architecture::Gemma3),
            fused_projections: architecture == Architecture::Phi3,
            gemma_block: gemma,
            attention_scale: match gemma {
                true => fields.positive("query_pre_attn_scalar", 256.0)?.powf(-0.5),
                false => (head_dim as f64).powf(-0.5),
            },
            // transformers does not use Gemma 3's.
            attention_softcap: softcap(&fields, "attn_logit_softcapping", architecture, 50.0)?
                .filter(|_| architecture == Architecture::Gemma2),
            logit_softcap: softcap(&fields, "final_logit_softcapping", architecture, 30.0)?,
            layer_ropes: layers::ropes(&fields, architecture, &windows)?,
            windows,
            ropes,
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

    fn count(&self, key: &str, default: usize) -> Result<usize, LmError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|v| usize::try_from(v).ok())
                .ok_or_else(|| LmError::config(key, format!("must be a count, not {}", shown(value)))),
        }
    }

    fn refuse_unsupported(&self) -> Result<(), LmError> {
        for key in ["quantization_config", "compression_config"] {
            if self.get(key).is_some() {
                return Err(LmError::config(key, "quantised weights are not supported"));
            }
        }
        match self.flag("use_bidirectional_attention", false)? {
            true => Err(LmError::config(
                "use_bidirectional_attention",
                "only causal attention is supported",
            )),
            false => Ok(()),
        }
    }
}

/// Gemma names its activation `hidden_activation`; a `hidden_act` beside it is not read.
fn activation(fields: &Fields, gemma: bool) -> Result<Activation, LmError> {
    let (key, default) = match gemma {
        true => ("hidden_activation", "gelu_pytorch_tanh"),
        false => ("hidden_act", "silu"),
    };
    match fields.get(key).map_or(Some(default), Value::as_str) {
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        other => {
            let name = printable(other.unwrap_or("(not a string)"));
            let detail = format!("{name} is not supported (supported: silu, gelu_pytorch_tanh)");
            Err(LmError::config(key, detail))
        }
    }
}

/// Absent means the default for Gemma 2, null means none; Gemma 3 has none unless it is given.
fn softcap(
    fields: &Fields,
    key: &str,
    architecture: Architecture,
    default: f64,
) -> Result<Option<f32>, LmError> {
    match (architecture, fields.0.get(key)) {
        (Architecture::Gemma2, None) => Ok(Some(default as f32)),
        (Architecture::Gemma2 | Architecture::Gemma3, Some(Value::Number(_))) => {
            Ok(Some(fields.positive(key, default)? as f32))
        }
        (Architecture::Gemma2 | Architecture::Gemma3, Some(other)) if !other.is_null() => Err(
            LmError::config(key, format!("must be a number above 0, not {}", shown(other))),
        ),
        _ => Ok(None),
    }
}

/// `default` None: one per query head.
fn num_kv_heads(fields: &Fields, default: Option<usize>, num_heads: usize) -> Result<usize, LmError> {
    const KEY: &str = "num_key_value_heads";
    // An absent field means the class default; an explicit null means one per query head.
    let default = default
        .filter(|_| !fields.0.contains_key(KEY))
        .unwrap_or(num_heads);
    let kv_heads = fields.size(KEY, num_heads, Some(default))?;
    if !num_heads.is_multiple_of(kv_heads) {
        let detail = format!("{kv_heads} does not divide num_attention_heads = {num_heads}");
        return Err(LmError::config(KEY, detail));
    }
    Ok(kv_heads)
}

/// `default` None: the hidden size divided among the heads.
fn head_dim(
    fields: &Fields,
    default: Option<usize>,
    hidden_size: usize,
    num_heads: usize,
) -> Result<usize, LmError> {
    const KEY: &str = "head_dim";
    let explicit = match fields.get(KEY) {
        Some(_) => Some(fields.size(KEY, 1024, None)?),
        None => default.filter(|_| !fields.0.contains_key(KEY)),
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
