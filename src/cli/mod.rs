//! The command line: serve, merge, jobs, checkpoints, openapi.

mod merge;
mod ops;
pub mod render_template;
mod serve;

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
    Merge(merge::MergeArgs),
    /// Look at the queue and cancel jobs.
    Jobs(Box<ops::JobsArgs>),
    /// Look at the cache; pin, verify and delete checkpoints, and free space.
    Checkpoints(Box<ops::CheckpointsArgs>),
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
            Command::Merge(args) => merge::run(args),
            Command::Jobs(args) => ops::jobs(*args),
            Command::Checkpoints(args) => ops::checkpoints(*args),
            Command::Openapi => {
                print!("{}", api::openapi()?);
                Ok(())
            }
            Command::RenderTemplate => render_template::run(),
        }
    }
}
