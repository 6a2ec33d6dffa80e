#!/usr/bin/env bash
# cauldron merge beside mergekit 0.1.5 and the limits of the machine, on random Llamas of 1.1B parameters, in one run:
# wall, CPU and peak memory; page cache warm and cold; output on tmpfs and on disk. A Markdown table on standard output,
# every sample in bench/results/merge-DATE-CPU.json.
#
#   bench/merge.sh                    all of it, base + 2 experts (over an hour, nearly all of it mergekit's)
#   bench/merge.sh --experts 2,3      base + 3 too
#   bench/merge.sh --quick            20M parameters and one run each: whether the benchmark works, not how fast anything is
#   bench/merge.sh --help             methods, cells and repeats by flag
#   bench/merge.sh --report FILE      the table of an earlier run
#
# BENCH_DIR (target/bench) holds the checkpoints, about 2.2 GB each, and the output on disk. OURS replaces our command line,
# for example OURS='target/release/cauldron merge {config} --models-dir {models} --data-dir {data}'; then nothing is built.
# MERGEKIT_ENV is a ready environment of scripts/requirements-mergekit.txt, to use instead of target/oracle/mergekit.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

for argument in "$@"; do
    case $argument in -h | --help | --report | --report=*) exec "$python" bench/merge.py "$@" ;; esac
done
bench=${BENCH_DIR:-target/bench}
mkdir -p "$bench"
if [ -z "${MERGEKIT_ENV:-}" ]; then
    environment mergekit scripts/requirements-mergekit.txt
    MERGEKIT_ENV=$environment
fi
if [ -z "${OURS:-}" ]; then
    cargo build --release --locked
    OURS="${CARGO_TARGET_DIR:-target}/release/cauldron merge {config} --models-dir {models} --data-dir {data}"
fi
"${CC:-cc}" -O3 -march=native -Wall -Wextra -pthread -o "$bench/limits" bench/limits.c
export BENCH_DIR=$bench MERGEKIT_ENV OURS
exec "$MERGEKIT_ENV/bin/python" bench/merge.py "$@"
