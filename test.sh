#!/usr/bin/env bash
# Passes all tests: one command. Makes the demo's models first, which the golden tests run on.
set -euo pipefail
cd "$(dirname "$0")"
demo/prepare.sh --experts
cargo test --workspace --locked "$@"
