//! The `cauldron` program.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match cauldron::cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // The causes on one line; a backtrace would say nothing to who starts the program.
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}
