#!/usr/bin/env bash
# Passes all tests: one command.
set -euo pipefail
cd "$(dirname "$0")"
cargo test --workspace --locked "$@"
