//! The decoder and its engine against other implementations, recorded numbers, and themselves.

#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests, outside #[test] functions

mod architectures;
mod common;
mod decoder;
mod decoder_vs_candle;
mod engine;
mod golden;
mod masked;
