//! Language models: config, decoder, scoring, sampling and the text around them, for models that share
//! one decoder block. It knows checkpoints, but nothing of merging, jobs or HTTP.
//!
//! The way of a request: text -> [`TextTokenizer`] -> [`Request`] -> [`Engine`], which packs all sequences of
//! one step into one [`Decoder`] forward -> [`Event`]s -> [`TextStream`] -> text.

mod arithmetic;
mod attention;
mod config;
mod constraint;
mod decoder;
mod engine;
mod error;
mod kernel;
mod kv;
mod masked;
mod ops;
mod packed;
mod pages;
mod quantized;
mod request;
mod rope;
mod sampler;
mod scheduler;
mod scoring;
mod stream;
mod template;
mod token_bytes;
mod tokenizer;
mod tokenizer_guard;
mod weights;

pub use arithmetic::{Arithmetic, Placement};
pub use config::{Activation, Architecture, ModelConfig};
pub use constraint::{Constraint, Grammars};
pub use decoder::{Decoder, Segment};
pub use engine::{DeviceCare, Engine, EngineConfig};
pub use error::LmError;
pub use kv::{BLOCK_TOKENS, KvPool};
pub use masked::{Expectations, MaskedLm};
pub use request::{Event, FinishReason, MAX_LOGPROBS, Request};
pub use rope::{RopeConfig, RopeScaling};
pub use sampler::{Sampler, Sampling};
pub use scoring::{MAX_ROWS, NO_LOGPROB, TokenLogprobs, score, score_logits};
pub use stream::{Chunk, TextStream};
pub use template::{ChatMessage, ChatTemplate, sandbox as template_sandbox};
pub use tokenizer::{MAX_PROMPT_BYTES, ReadFile, SpecialTokens, TextTokenizer};
pub use weights::WeightSource;
