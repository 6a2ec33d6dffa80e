#!/usr/bin/env bash
# Builds what scripts/gpu_check.sh runs, on a machine that need not have a GPU: scripts/gpu_build.sh [FOLDER] (default:
# target/gpu). Takes the CUDA toolkit that scripts/cuda_toolkit.sh assembles.
set -euo pipefail
cd "$(dirname "$0")/.."
to=${1:-target/gpu}
mkdir -p "$to"
config=$(scripts/cuda_toolkit.sh target/cuda)
# One call, so that everything is built with one set of features.
cargo build --release --locked --features cuda --config "$config" -p cauldron -p cauldron-merge -p cauldron-lm \
    --bin cauldron --example resident --example speed --test lm --message-format json-render-diagnostics | python3 -c '
import json, sys
for line in sys.stdin:
    unit = json.loads(line)
    if unit.get("executable") and unit["target"]["name"] in ("cauldron", "lm", "resident", "speed"):
        print(unit["target"]["name"], unit["executable"])
' | while read -r name program; do
    [ "$name" = lm ] && name=lm_tests
    cp "$program" "$to/$name"
    strip "$to/$name"
done
# What travels to the machine with the GPU is to be small.
xz --force --threads=0 "$to/cauldron"
ls -l "$to"
