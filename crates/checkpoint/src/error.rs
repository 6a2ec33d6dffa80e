//! The one error of this crate. Messages name files relative to their folder, never absolute paths.

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{file}: {source}")]
    Io { file: String, source: std::io::Error },
    #[error("{file} is missing")]
    Missing { file: String },
    #[error("{file} is not a regular file")]
    NotAFile { file: String },
    #[error("{file}: {detail}")]
    Malformed { file: String, detail: String },
    #[error("tensor {tensor}: {detail}")]
    Tensor { tensor: String, detail: String },
    #[error("the file {file} was cut short while it was being read")]
    Truncated { file: String },
    #[error("cancelled")]
    Cancelled,
}

impl CheckpointError {
    /// Stable slug for machine readers.
    pub fn slug(&self) -> &'static str {
        match self {
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "insufficient-storage"
            }
            Self::Io { .. } => "checkpoint-io",
            Self::Missing { .. } => "checkpoint-missing-file",
            Self::NotAFile { .. } => "checkpoint-not-a-file",
            Self::Malformed { .. } => "checkpoint-malformed",
            Self::Tensor { .. } => "checkpoint-tensor",
            Self::Truncated { .. } => "checkpoint-truncated",
            Self::Cancelled => "cancelled",
        }
    }

    pub(crate) fn malformed(file: &str, detail: impl Into<String>) -> Self {
        Self::Malformed {
            file: file.to_owned(),
            detail: detail.into(),
        }
    }

    pub(crate) fn io(file: &str, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::NotFound {
            return Self::Missing {
                file: file.to_owned(),
            };
        }
        // fs_err would print the whole path; only the kind and system message belong in an answer.
        Self::Io {
            file: file.to_owned(),
            source,
        }
    }
}
