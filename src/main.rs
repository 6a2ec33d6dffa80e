//! The `cauldron` program.

use clap::Parser;

fn main() -> anyhow::Result<()> {
    cauldron::cli::Cli::parse().run()
}
