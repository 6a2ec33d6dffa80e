#!/usr/bin/env bash
# Passes all tests: one command. Makes the demo's models first, which the golden tests run on, and installs an S3 server for the
# tests of the remote cache; then the kernels for GPUs on the CPU, and the fast oracles, whose packages it installs under
# target/oracle. Arguments go to cargo test, and then the last two are left out.
set -euo pipefail
cd "$(dirname "$0")"
demo/prepare.sh --experts
scripts/s3_server.sh
if [ $# -gt 0 ]; then
    exec cargo test --workspace --locked "$@"
fi
# Meanwhile: what fails here is tried again when it is needed.
setsid nice scripts/oracles.sh install &
install=$!
trap 'kill -- "-$install" 2>/dev/null || true' EXIT
cargo test --workspace --locked
cargo test --workspace --locked --features cauldron-merge/emulated --test merge -- on_gpu
cargo test --workspace --locked --features cauldron-merge/emulated --test kernels
wait "$install" || true
trap - EXIT
cargo build --locked
scripts/oracle_mergekit.sh
scripts/oracles.sh fast
