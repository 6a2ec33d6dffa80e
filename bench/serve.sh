#!/usr/bin/env bash
# The service beside transformers, lm-eval's hf backend and llama.cpp on the same checkpoint and the same threads, alternating
# in one run: scoring, multiple choice through lm-eval, generation at 1, 8 and 32 streams, samples of one prompt, overload,
# and what HTTP and scheduling cost. A Markdown table on standard output, every sample in bench/results/serve-DATE-CPU.json.
#
#   bench/serve.sh               all of it, on the demo's base model of 135M parameters (about 25 minutes)
#   bench/serve.sh --quick       one short round: whether the benchmark works, not how fast anything is
#   bench/serve.sh --only NAME   one part: score, choice, generate, samples, overload, overhead; may be repeated
#   bench/serve.sh --report FILE the table of an earlier run
#
# The peers' packages go into target/oracle; llama.cpp is built there for this machine, which takes minutes once.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

for argument in "$@"; do
    case $argument in -h | --help | --report | --report=*) exec "$python" bench/serve.py "$@" ;; esac
done
demo/prepare.sh --experts
environment llama bench/requirements-llama.txt
environment transformers scripts/requirements-oracles.txt
cargo build --release --locked
cargo build --release --locked -p cauldron-lm --example speed
mkdir -p target/bench
for precision in f32 bf16; do
    file=target/bench/base-$precision.gguf
    [ -s "$file" ] || "$oracle/llama/bin/python" bench/to_gguf.py "$models/base" "$precision" "$file"
done
exec "$python" bench/serve.py "$@"
