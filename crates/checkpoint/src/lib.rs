//! Read and write Hugging Face checkpoints.
//!
//! This crate owns the bytes on disk: the strict layer over safetensors and content digests. It knows
//! nothing of merging, models or HTTP.

mod checkpoint;
mod digest;
mod error;
mod files;
mod header;
mod widen;

pub use checkpoint::{Checkpoint, SIDECAR_FILES, TensorInfo};
pub use digest::{Digest, ParseDigestError};
pub use error::CheckpointError;
pub use header::{MAX_HEADER_BYTES, dtype_size, is_float};
pub use safetensors::Dtype;
pub use widen::{narrow, narrow_one_is_finite, widen};
