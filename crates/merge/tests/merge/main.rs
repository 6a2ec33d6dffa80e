//! Merging as a caller sees it: checkpoints on disk in, a checkpoint on disk out.

#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests, outside #[test] functions

mod contents;
mod edges;
mod fixture;
mod golden;
mod memory;
#[cfg(feature = "emulated")]
mod on_gpu;
mod properties;
mod recipes;
mod refusals;
mod resume;
mod vocabularies;
mod whole_folder;
