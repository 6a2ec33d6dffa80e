//! The service as a client sees it: the real router, queue, cache, engine and files, in one process without a port.

#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests, outside #[test] functions

mod cache;
mod chat_api;
mod checkpoints_api;
mod common;
mod completions_api;
mod devices;
mod evals;
mod families;
mod faults;
mod format_api;
mod links;
mod merge_api;
mod models_api;
mod openapi;
mod process;
mod queue;
mod remote;
mod score_api;
mod security;
mod server;
mod simulation;
mod slots;
mod store;
mod sweeps;
