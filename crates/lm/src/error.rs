//! The one error of this crate. Messages name fields, tensors and files of the model, never paths.

use cauldron_checkpoint::CheckpointError;

/// Why a model cannot be loaded, or a request cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum LmError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A field of config.json that is missing, out of range or not supported.
    #[error("config.json: {field}: {detail}")]
    Config { field: String, detail: String },
    #[error(
        "architecture {name} is not supported (supported: {})",
        crate::config::SUPPORTED
    )]
    UnsupportedArchitecture { name: String },
    /// A weight that is missing or has another shape than the config says.
    #[error("tensor {tensor}: {detail}")]
    Tensor { tensor: String, detail: String },
    #[error("tokenizer: {detail}")]
    Tokenizer { detail: String },
    #[error("chat template: {detail}")]
    Template { detail: String },
    /// A request that cannot be run as it is.
    #[error("{field}: {detail}")]
    Request { field: &'static str, detail: String },
    /// A computation on the device failed.
    #[error("computation failed: {detail}")]
    Compute { detail: String },
}

impl LmError {
    /// Stable slug for machine readers.
    pub fn slug(&self) -> &'static str {
        match self {
            Self::Checkpoint(e) => e.slug(),
            Self::Config { .. } => "model-config",
            Self::UnsupportedArchitecture { .. } => "unsupported-architecture",
            Self::Tensor { .. } => "model-tensor",
            Self::Tokenizer { .. } => "tokenizer",
            Self::Template { .. } => "chat-template",
            Self::Request { .. } => "invalid-request",
            Self::Compute { .. } => "compute",
        }
    }

    pub fn missing_tensor(name: &str) -> Self {
        Self::Tensor {
            tensor: name.to_owned(),
            detail: "is missing".into(),
        }
    }

    pub(crate) fn config(field: &str, detail: impl Into<String>) -> Self {
        Self::Config {
            field: field.to_owned(),
            detail: detail.into(),
        }
    }

    pub(crate) fn tokenizer(detail: impl Into<String>) -> Self {
        Self::Tokenizer {
            detail: detail.into(),
        }
    }

    pub(crate) fn template(detail: impl Into<String>) -> Self {
        Self::Template {
            detail: detail.into(),
        }
    }

    pub(crate) fn request(field: &'static str, detail: impl Into<String>) -> Self {
        Self::Request {
            field,
            detail: detail.into(),
        }
    }
}

impl From<candle_core::Error> for LmError {
    fn from(error: candle_core::Error) -> Self {
        // With RUST_BACKTRACE set candle appends a backtrace; only its first line is a message.
        let text = error.to_string();
        let detail = text.lines().next().unwrap_or("unknown").to_owned();
        Self::Compute { detail }
    }
}
