//! The families by the names that transformers gives them, and what their configuration classes take for granted.

use serde_json::{Map, Value};

use super::printable;
use crate::LmError;

pub(crate) const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, \
    SmolLM3ForCausalLM, Phi3ForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM";

/// The families that share one decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    SmolLm3,
    Phi3,
    Gemma2,
    /// The text model only.
    Gemma3,
}

/// Values of fields that config.json leaves out.
pub(super) struct Defaults {
    /// None: one per query head.
    pub num_kv_heads: Option<usize>,
    /// None: the hidden size divided among the heads.
    pub head_dim: Option<usize>,
    pub max_position: usize,
    pub rope_theta: f64,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    /// Whether the class reads `attention_bias`, and `mlp_bias`.
    pub has_attention_bias: bool,
    pub has_mlp_bias: bool,
}

impl Architecture {
    const ALL: [(Self, &'static str, &'static str); 8] = [
        (Self::Llama, "LlamaForCausalLM", "llama"),
        (Self::Mistral, "MistralForCausalLM", "mistral"),
        (Self::Qwen2, "Qwen2ForCausalLM", "qwen2"),
        (Self::Qwen3, "Qwen3ForCausalLM", "qwen3"),
        (Self::SmolLm3, "SmolLM3ForCausalLM", "smollm3"),
        (Self::Phi3, "Phi3ForCausalLM", "phi3"),
        (Self::Gemma2, "Gemma2ForCausalLM", "gemma2"),
        (Self::Gemma3, "Gemma3ForCausalLM", "gemma3_text"),
    ];

    /// By `architectures[0]`, or by `model_type` where that is missing.
    pub(super) fn read(config: &Map<String, Value>) -> Result<Self, LmError> {
        let class = config
            .get("architectures")
            .and_then(|list| list.get(0))
            .and_then(Value::as_str);
        let kind = config.get("model_type").and_then(Value::as_str);
        let found = Self::ALL.iter().find(|(_, own_class, own_kind)| match class {
            Some(class) => class == *own_class,
            None => kind == Some(*own_kind),
        });
        found
            .map(|(architecture, ..)| *architecture)
            .ok_or_else(|| LmError::UnsupportedArchitecture {
                name: printable(class.or(kind).unwrap_or("(none named)")),
            })
    }

    pub(super) fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }

    pub(super) fn defaults(self) -> Defaults {
        let llama = Defaults {
            num_kv_heads: None,
            head_dim: None,
            max_position: 2048,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            has_attention_bias: true,
            has_mlp_bias: true,
        };
        let gemma = Defaults {
            num_kv_heads: Some(4),
            head_dim: Some(256),
            max_position: 8192,
            tie_word_embeddings: true,
            has_mlp_bias: false,
            ..llama
        };
        match self {
            Self::Llama => llama,
            Self::Mistral => Defaults {
                num_kv_heads: Some(8),
                max_position: 131_072,
                has_attention_bias: false,
                has_mlp_bias: false,
                ..llama
            },
            Self::Qwen2 => Defaults {
                num_kv_heads: Some(32),
                max_position: 32_768,
                has_attention_bias: false,
                has_mlp_bias: false,
                ..llama
            },
            Self::Qwen3 => Defaults {
                num_kv_heads: Some(32),
                head_dim: Some(128),
                max_position: 32_768,
                has_mlp_bias: false,
                ..llama
            },
            Self::SmolLm3 => Defaults {
                num_kv_heads: Some(4),
                max_position: 32_768,
                rope_theta: 2e6,
                tie_word_embeddings: true,
                ..llama
            },
            Self::Phi3 => Defaults {
                max_position: 4096,
                rms_norm_eps: 1e-5,
                has_attention_bias: false,
                has_mlp_bias: false,
                ..llama
            },
            Self::Gemma2 => gemma,
            Self::Gemma3 => Defaults {
                max_position: 131_072,
                rope_theta: 1e6,
                ..gemma
            },
        }
    }
}
