//! The `cauldron` program.

use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

fn main() -> ExitCode {
    raise_open_files();
    match cauldron::cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // The causes on one line; a backtrace would say nothing to who starts the program.
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// As many open files as the system lets this process have: each shard of a parent is one.
fn raise_open_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
}
