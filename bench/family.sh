#!/usr/bin/env bash
# Points of families that are served: how long a request waits whose lambda is not in memory yet, and what the pass over the
# parents takes of the machine's bandwidth of memory (a copy by the same number of threads, in the same run, between the
# points). The demo's experts, 135M parameters in BF16. A Markdown table on standard output, every sample in
# bench/results/family-DATE-CPU.json.
#
#   bench/family.sh [--rounds N]   N points a method (12)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
demo/prepare.sh --experts
[ -n "${SKIP_BUILD:-}" ] || cargo build --release --locked
mkdir -p target/bench
cc -O3 -march=native -pthread -o target/bench/limits bench/limits.c -lm
exec "$python" bench/family.py "$@"
