//! The GPU's side: CUDA kernels (`kernels/*.cu`), and calls of them that check what they are given. It knows tensors on a
//! device, but neither recipes nor models: crates/merge and crates/lm say what to compute.
//!
//! All work of one `Gpu` runs on one stream, in the order of the calls; what a call returns may still be computed.

#![cfg(feature = "cuda")]

mod attention;
mod decoder;
mod device;
mod merge;

pub use attention::{Attention, Heads, Pages, Rotation, Span};
pub use decoder::{Gate, Rows, Summary};
pub use device::{Gpu, count, free_bytes, is_available, reset};
pub use merge::{Bytes, Change, Edge, Mean, Member, Number, Operation, Pass, Plan, Survivors};
