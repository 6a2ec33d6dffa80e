#!/usr/bin/env bash
# Passes all tests: one command. Makes the demo's models first, which the golden tests run on, and installs an S3 server for the
# tests of the remote cache; then the fast oracles, whose packages it installs under target/oracle. Arguments go to cargo test, and then the oracles are left out.
set -euo pipefail
cd "$(dirname "$0")"
demo/prepare.sh --experts
scripts/s3_server.sh
cargo test --workspace --locked "$@"
if [ $# -eq 0 ]; then
    cargo build --locked
    scripts/oracle_mergekit.sh
    scripts/oracles.sh fast
fi
