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
    /// The device had no memory for a computation.
    #[error("gpu-out-of-memory: {detail}")]
    OutOfMemory { detail: String },
    /// The device failed, and so will all that follows until it is opened anew.
    #[error("gpu-failed: {detail}")]
    DeviceLost { detail: String },
}

/// What CUDA and cuBLAS call a lack of memory.
const NO_MEMORY: &[&str] = &["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"];

/// CUDA's errors that every later call of the process repeats ("the process must be terminated and relaunched", or its context
/// destroyed): CUDA driver API, `CUresult`.
const STICKY: &[&str] = &[
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_INVALID_CONTEXT",
    "CUDA_ERROR_CONTAINED",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    // What cuBLAS says of them.
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
];

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
            Self::OutOfMemory { .. } => "gpu-out-of-memory",
            Self::DeviceLost { .. } => "gpu-failed",
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

impl LmError {
    /// What CUDA or cuBLAS says of a computation that failed.
    pub fn of_device(text: &str) -> Self {
        let detail = first_line(text);
        let names = |codes: &[&str]| codes.iter().any(|code| text.contains(code));
        if names(NO_MEMORY) {
            Self::OutOfMemory { detail }
        } else if names(STICKY) {
            Self::DeviceLost { detail }
        } else {
            Self::Compute { detail }
        }
    }
}

impl From<candle_core::Error> for LmError {
    fn from(error: candle_core::Error) -> Self {
        let text = error.to_string();
        match is_of_device(&error) {
            true => Self::of_device(&text),
            false => Self::Compute {
                detail: first_line(&text),
            },
        }
    }
}

/// With RUST_BACKTRACE set candle appends a backtrace; only its first line is a message.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or("unknown").to_owned()
}

/// Whether CUDA's libraries said it: other texts may name what a model's files say.
fn is_of_device(error: &candle_core::Error) -> bool {
    use candle_core::Error;
    match error {
        Error::Cuda(_) => true,
        Error::WithBacktrace { inner, .. } | Error::Context { inner, .. } | Error::WithPath { inner, .. } => {
            is_of_device(inner)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_says_is_known_by_cudas_names() {
        let slug = |text| LmError::of_device(text).slug();
        let no_memory = r#"DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")"#;
        assert_eq!(slug(no_memory), "gpu-out-of-memory");
        assert_eq!(
            slug("CublasError(CUBLAS_STATUS_ALLOC_FAILED)"),
            "gpu-out-of-memory"
        );
        let address =
            "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access\")\n   0: backtrace";
        assert_eq!(slug(address), "gpu-failed");
        assert!(!LmError::of_device(address).to_string().contains("backtrace"));
        assert_eq!(slug("shape mismatch"), "compute");
        let of_files = candle_core::Error::Msg(no_memory.to_owned());
        assert_eq!(LmError::from(of_files).slug(), "compute");
        let of_cuda = candle_core::Error::Cuda(no_memory.into()).bt();
        assert_eq!(LmError::from(of_cuda).slug(), "gpu-out-of-memory");
    }
}
