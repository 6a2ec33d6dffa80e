#!/usr/bin/env bash
# Builds what scripts/gpu_check.sh runs, on a machine without a GPU: scripts/gpu_build.sh [FOLDER] (default: target/gpu).
# Takes the CUDA toolkit from target/cuda, which scripts/cuda_toolkit.sh assembles if it is not there.
set -euo pipefail
cd "$(dirname "$0")/.."
to=${1:-target/gpu}
mkdir -p "$to"
scripts/cuda_toolkit.sh target/cuda >/dev/null
build() { cargo build --release --features cuda --config target/cuda/cargo.toml "$@"; }
build -p cauldron-merge --example resident
build -p cauldron-lm --example speed
tests=$(cargo test --release --features cuda --config target/cuda/cargo.toml -p cauldron-lm --test lm --no-run 2>&1 | tee /dev/stderr | sed -n 's/.*Executable.*(\(.*\))/\1/p')
release=target/x86_64-unknown-linux-gnu/release
cp "$release/examples/resident" "$release/examples/speed" "$to/"
cp "$tests" "$to/lm_tests"
strip "$to/resident" "$to/speed" "$to/lm_tests"
ls -l "$to"
