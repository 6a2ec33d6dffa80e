//! The two errors of this crate: a recipe that is refused, and a merge that failed.

use std::io::ErrorKind;

use cauldron_checkpoint::CheckpointError;

/// A recipe that is refused before any weight is read; `field` is the path of the offending field, such as
/// `models[1].weight`, and empty where the body as a whole is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {detail}")]
pub struct RecipeError {
    pub field: String,
    pub detail: String,
}

impl RecipeError {
    pub fn new(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            detail: detail.into(),
        }
    }
}

/// Why a merge that was accepted did not give a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    #[error("cancelled")]
    Cancelled,
    #[error("tensor {tensor}: the result is not finite although its inputs are (an overflow of {dtype})")]
    NonFinite { tensor: String, dtype: String },
    #[error("tensor {tensor} of {parent} has a value that is NaN or infinite")]
    NonFiniteInput { tensor: String, parent: String },
    #[error("tensor {tensor} has dtype {dtype}, which is copied only if all parents agree, and they differ")]
    IntegerTensor { tensor: String, dtype: String },
    #[error("tensor {tensor}: the method has no result: {detail}")]
    Undefined { tensor: String, detail: String },
    #[error("{parent}: {source}")]
    Parent { parent: String, source: CheckpointError },
    #[error("the files of {parent} were changed while they were being merged")]
    ParentChanged { parent: String },
    #[error("{source}")]
    Output { source: CheckpointError },
    #[error("the checkpoint does not match its manifest: {detail}")]
    Corrupt { detail: String },
    /// The machine's fault of the moment, not the checkpoint's: nothing is known of its bytes.
    #[error("the checkpoint cannot be read now: {file}: {source}")]
    Unreadable { file: String, source: std::io::Error },
    #[cfg(feature = "gpu")]
    #[error("{detail}")]
    Gpu { detail: String },
    #[error("the merge was stopped by a fault of its own: {detail}")]
    Internal { detail: String },
}

impl MergeError {
    /// Stable slug for machine readers.
    pub fn slug(&self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::NonFinite { .. } => "non-finite",
            Self::NonFiniteInput { .. } => "non-finite-input",
            Self::Undefined { .. } => "undefined-result",
            Self::IntegerTensor { .. } => "integer-tensor-differs",
            Self::Output {
                source: CheckpointError::Io { source, .. },
            } if source.kind() == ErrorKind::QuotaExceeded => "insufficient-storage",
            Self::Parent { source, .. } | Self::Output { source } => source.slug(),
            Self::ParentChanged { .. } => "parent-changed",
            Self::Corrupt { .. } => "corrupt-checkpoint",
            Self::Unreadable { .. } => "checkpoint-io",
            #[cfg(feature = "gpu")]
            Self::Gpu { .. } => "gpu",
            Self::Internal { .. } => "internal",
        }
    }

    pub(crate) fn parent(parent: &str, source: CheckpointError) -> Self {
        match source {
            CheckpointError::Cancelled => Self::Cancelled,
            source => Self::Parent {
                parent: parent.to_owned(),
                source,
            },
        }
    }

    pub(crate) fn output(source: CheckpointError) -> Self {
        Self::Output { source }
    }

    /// What an error of the file system says of a finished checkpoint: a file that is not there is damage; anything
    /// else (no descriptors, no permission, a failing disk) may pass.
    pub(crate) fn reading(file: &str, source: std::io::Error) -> Self {
        match source.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory => Self::Corrupt {
                detail: format!("{file}: {source}"),
            },
            _ => Self::Unreadable {
                file: file.to_owned(),
                source,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_that_is_used_up_is_a_full_disk() {
        let error = |kind: ErrorKind| {
            MergeError::output(CheckpointError::Io {
                file: "model.safetensors".into(),
                source: kind.into(),
            })
        };
        assert_eq!(error(ErrorKind::QuotaExceeded).slug(), "insufficient-storage");
        assert_eq!(error(ErrorKind::StorageFull).slug(), "insufficient-storage");
        assert_eq!(error(ErrorKind::PermissionDenied).slug(), "checkpoint-io");
    }
}
