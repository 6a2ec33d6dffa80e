#!/usr/bin/env bash
# All methods against mergekit, and the M3 formulas against numpy, on tiny random models (needs a built target/debug/cauldron).
#
#   scripts/oracle_mergekit.sh [methods | m3 | 0.1.4] [--self-check] [--only WORD] [more options of the Python scripts]
#
# 0.1.4 is mergekit's version before the one we follow; where it differs is listed in oracle_methods.py.
#
# Their packages go into environments under target/oracle, with pinned versions.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

which=all
case ${1:-} in methods | m3 | 0.1.4) which=$1; shift ;; esac
mkdir -p "$oracle"
failed=0

if [ "$which" = 0.1.4 ]; then
    environment mergekit-0.1.4 scripts/requirements-mergekit-0.1.4.txt
    exec "$environment/bin/python" scripts/oracle_methods.py "$@"
fi
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
