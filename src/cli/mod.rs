//! The command line: serve, merge, jobs, checkpoints, sweep, openapi.

mod merge;
mod ops;
pub mod render_template;
mod serve;
mod sweep;

use clap::{Parser, Subcommand};

use crate::api;
use crate::config::Config;

/// Merges fine-tuned language models over HTTP and serves the result.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service.
    Serve(Box<Config>),
    /// Run one recipe without a server, into the same cache.
    Merge(Box<merge::MergeArgs>),
    /// Look at the queue and cancel jobs.
    Jobs(Box<ops::JobsArgs>),
    /// Look at the cache; pin, verify and delete checkpoints, and free space.
    Checkpoints(Box<ops::CheckpointsArgs>),
    /// Search the shares of a recipe on a running server.
    Sweep(Box<sweep::SweepArgs>),
    /// Print the OpenAPI document.
    Openapi,
    /// Render a chat template, standard input to standard output, under limits; `serve` starts it for each conversation.
    #[command(hide = true, name = render_template::NAME)]
    RenderTemplate,
}

impl Cli {
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Serve(config) => serve::run(*config),
            Command::Merge(args) => merge::run(*args),
            Command::Jobs(args) => ops::jobs(*args),
            Command::Checkpoints(args) => ops::checkpoints(*args),
            Command::Sweep(args) => sweep::run(*args),
            Command::Openapi => {
                print!("{}", api::openapi()?);
                Ok(())
            }
            Command::RenderTemplate => render_template::run(),
        }
    }
}
