//! Cauldron: an HTTP service that merges fine-tuned language models and serves the result.
//!
//! This package is the service: HTTP, jobs, cache, serving. Tensor arithmetic is in `cauldron-merge`, the decoder in
//! `cauldron-lm`, files in `cauldron-checkpoint`. docs/ARCHITECTURE.md has the house on one page.

// jobs/sql/queries.rs is compiled for each database.
#![allow(clippy::duplicate_mod)]

pub mod api;
pub mod app;
pub mod cache;
pub mod cli;
pub mod config;
pub mod eval;
mod failpoint;
pub mod jobs;
pub mod server;
pub mod serving;
pub mod sources;
pub mod sweep;
pub mod telemetry;
