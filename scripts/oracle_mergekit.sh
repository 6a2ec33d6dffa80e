#!/usr/bin/env bash
# All methods against mergekit, and the M3 formulas against numpy, on tiny random models (needs a built target/debug/cauldron).
#
#   scripts/oracle_mergekit.sh [methods | m3] [--self-check] [--only WORD] [more options of the Python scripts]
#
# Their packages go into environments under target/oracle, with pinned versions.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

which=all
case ${1:-} in methods | m3) which=$1; shift ;; esac
mkdir -p "$oracle"
failed=0

if [ "$which" != m3 ]; then
    environment mergekit scripts/requirements-mergekit.txt
    "$environment/bin/python" scripts/oracle_methods.py "$@" || failed=1
fi
if [ "$which" != methods ]; then
    printf '%s\n' numpy==2.4.6 blake3==1.0.11 PyYAML==6.0.4 >"$oracle/requirements-reference.txt"
    environment reference "$oracle/requirements-reference.txt"
    "$environment/bin/python" scripts/reference_m3.py "$@" || failed=1
fi
exit "$failed"
