#!/usr/bin/env bash
# The design of Table 2 of Mixup Model Merge (arXiv 2502.15434) on the demo's experts: pairs x {average, task arithmetic, TIES, DARE} x
# {plain, M3}. Writes docs/REPRODUCTION.md and its pictures. About five minutes a sweep on two cores, twelve sweeps.
#
#   demo/reproduce.sh [--pairs math+sentiment,...] [--methods average,TIES,...] [--limit ITEMS] [--seed N]
set -euo pipefail
cd "$(dirname "$0")/.."
demo/prepare.sh --all-experts
[ -n "${CAULDRON:-}" ] || cargo build --release --locked
exec "${PYTHON:-python3}" demo/reproduce.py "$@"
