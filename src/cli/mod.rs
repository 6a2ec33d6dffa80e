//! The command line: serve, merge, openapi.

mod merge;
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
    /// Print the OpenAPI document.
    Openapi,
}

impl Cli {
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Serve(config) => serve::run(*config),
            Command::Merge(args) => merge::run(args),
            Command::Openapi => {
                print!("{}", api::openapi()?);
                Ok(())
            }
        }
    }
}
