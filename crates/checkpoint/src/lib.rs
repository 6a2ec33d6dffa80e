//! Read and write Hugging Face checkpoints.
//!
//! This crate owns the bytes on disk: the strict layer over safetensors, content digests, LoRA adapters and
//! the sharded writer. It knows nothing of merging, models or HTTP.

mod adapter;
mod checkpoint;
mod chunks;
mod digest;
mod error;
mod expert;
mod files;
mod header;
mod held;
mod lora;
pub mod simd;
mod widen;
mod writer;

pub use adapter::Adapter;
pub use checkpoint::{Checkpoint, SIDECAR_FILES, TensorInfo, tensor_digest};
pub use chunks::{CHUNK_ELEMENTS, Chunks, LONGEST_ROW, has_whole_rows, row_len};
pub use digest::{Digest, ParseDigestError};
pub use error::CheckpointError;
pub use expert::Expert;
pub use header::{MAX_HEADER_BYTES, dtype_size, is_float};
pub use held::{HeldWeights, Hold, Keeper, LetGo, Place};
pub use lora::LoraFactors;
pub use safetensors::Dtype;
pub use widen::{Bf16, F16, F32, Stored, narrow, narrow_one_is_finite, widen, widen_difference};
pub use writer::{FileEntry, ShardPlan, ShardedWriter, TensorPlan, pretty, write_small};
