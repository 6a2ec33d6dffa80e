//! The GPU's side: CUDA kernels (`kernels/*.cu`), and calls of them that check what they are given. It knows tensors on a
//! device, but neither recipes nor models: crates/merge and crates/lm say what to compute.
//!
//! All work of one `Gpu` runs on one stream, in the order of the calls; what a call returns may still be computed. A lane has
//! a stream of its own.

#![cfg(any(feature = "cuda", feature = "emulated"))]

#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod decoder;
#[cfg(feature = "cuda")]
mod device;
#[cfg(not(feature = "cuda"))]
#[path = "emulated.rs"]
mod device;
mod draw;
mod lane;
mod merge;

#[cfg(feature = "cuda")]
pub use attention::{Attention, Heads, Pages, Rotation, Span};
#[cfg(feature = "cuda")]
pub use decoder::{Gate, Rows, Summary};
pub use device::Gpu;
#[cfg(feature = "cuda")]
pub use device::{count, free_bytes, is_available, reset};
pub use draw::Chance;
pub use lane::Lane;
pub use merge::{
    ALIGNMENT, Bytes, Change, Draw, Edge, MOST_MEMBERS, Mean, Member, Number, Operation, Pass, Plan,
    Survivors,
};
