#!/usr/bin/env bash
# The M3 search from recipe to verdict (seven draws, each parent alone, equal shares; two of the demo's experts, two tasks of 200
# items) with one POST /sweeps, and with mergekit 0.1.5 and lm-eval's hf backend for each lambda, in one run: the same items, the
# same precision (float32), the peer at its fastest batch size. Wall time from nothing (no server, nothing cached) to the winner.
# A Markdown table on standard output, every trial in bench/results/sweep-DATE-CPU.json. About half an hour.
#
#   bench/sweep.sh [--pair math+sentiment] [--seed N] [--items N] [--batch N]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
demo/prepare.sh --experts
environment mergekit scripts/requirements-mergekit.txt
environment transformers scripts/requirements-oracles.txt
[ -n "${SKIP_BUILD:-}" ] || cargo build --release --locked
mkdir -p target/bench
exec "$python" bench/sweep.py "$@"
