#!/usr/bin/env bash
# Compiles the CUDA kernels (crates/gpu/kernels) by themselves, on any machine: they cannot rot where the feature is not built.
# Assembles nvcc under target/cuda first (scripts/cuda_toolkit.sh). Warnings are errors.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/cuda_toolkit.sh >/dev/null
cap=${CUDA_COMPUTE_CAP:-90}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for kernels in crates/gpu/kernels/*.cu; do
    # The flag of build.rs that decides whether the compiler joins products and sums changes no syntax.
    target/cuda/bin/nvcc --fatbin -O3 -Werror all-warnings "-gencode=arch=compute_$cap,code=[sm_$cap,compute_$cap]" -o "$out/kernels.fatbin" "$kernels"
    echo "$kernels compiles for sm_$cap"
done
