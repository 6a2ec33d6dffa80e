//! `cauldron render-template`: the other side of `cauldron_lm::template_sandbox`. It may die of what it reads.

use std::io::{stdin, stdout};

use anyhow::Context;
use cauldron_lm::template_sandbox::{self, MEMORY_BYTES, SECONDS};
use rustix::process::{Resource, Rlimit, setrlimit};

pub const NAME: &str = "render-template";

/// Lets templates be rendered by this very program.
pub(super) fn enable() -> anyhow::Result<()> {
    let program = std::env::current_exe().context("finding this program's file")?;
    template_sandbox::set(program, NAME);
    Ok(())
}

pub(super) fn run() -> anyhow::Result<()> {
    limit(Resource::As, MEMORY_BYTES)?;
    limit(Resource::Cpu, SECONDS)?;
    // Death is an answer here, not something to look into.
    limit(Resource::Core, 0)?;
    Ok(template_sandbox::serve(stdin(), stdout())?)
}

fn limit(resource: Resource, most: u64) -> anyhow::Result<()> {
    let most = Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    Ok(setrlimit(resource, most)?)
}
