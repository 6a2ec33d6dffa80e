#!/usr/bin/env bash
# Assembles a CUDA 13.0 toolkit (nvcc, headers, static runtime) from NVIDIA's packages on PyPI: enough to build with feature
# `cuda` on a machine that has neither a GPU nor a toolkit, without root.
#
#   scripts/cuda_toolkit.sh [FOLDER]       (default: target/cuda; seconds; nothing to do if it is there)
#   cargo build --release --features cuda --config target/cuda/cargo.toml
#
# CUDA_COMPUTE_CAP (default 90: H100, H200) names the GPU. Needs Linux x86_64, python3 with pip, and a C++ compiler.
set -euo pipefail
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "Linux x86_64 only" >&2; exit 1; }
mkdir -p "${1:-target/cuda}"
folder=$(cd "${1:-target/cuda}" && pwd)
# All of CUDA 13.0: a newer nvcc writes PTX that the driver 580 refuses. The packages name their needs without versions,
# so pip must not look at them.
packages='nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85'
if [ "$(cat "$folder/.packages" 2>/dev/null)" != "$packages" ]; then
    new=$(mktemp -d "$folder/.new.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    # shellcheck disable=SC2086
    python3 -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary=:all: --target "$new" $packages
    toolkit=$new/nvidia/cu13
    # The packages have lib, build scripts look in lib64.
    ln -s lib "$toolkit/lib64"
    # -lcudart takes the static runtime, which finds the driver when it runs.
    echo 'INPUT(-l:libcudart_static.a -ldl -lrt -lpthread)' >"$toolkit/lib/libcudart.so"
    # The linker is told these names, but nothing refers to them (see below).
    mkdir "$toolkit/lib/stubs"
    for name in cuda cublas cublasLt curand nvrtc; do
        "${CC:-cc}" -shared -nostdlib -x c /dev/null -o "$toolkit/lib/stubs/lib$name.so"
    done
    for part in bin include lib lib64 nvvm; do
        rm -rf "${folder:?}/$part"
        mv "$toolkit/$part" "$folder/"
    done
    echo "$packages" >"$folder/.packages"
fi
new=$(mktemp "$folder/.cargo.XXXXXX")
cat >"$new" <<TOML
# Written by scripts/cuda_toolkit.sh.
[build]
target = "x86_64-unknown-linux-gnu"
# candle asks cudarc to link CUDA's libraries; with this they are looked for when the program runs, so that one program
# starts with and without a GPU. build.target keeps the flag from build scripts, which would refuse it.
[target.x86_64-unknown-linux-gnu]
rustflags = ["--cfg", 'feature="dynamic-loading"']
[env]
CUDA_HOME = { value = "$folder", force = true }
CUDA_PATH = { value = "$folder", force = true }
NVCC = { value = "$folder/bin/nvcc", force = true }
CUDARC_CUDA_VERSION = { value = "13000", force = true }
CUDA_COMPUTE_CAP = { value = "${CUDA_COMPUTE_CAP:-90}", force = true }
TOML
if cmp -s "$new" "$folder/cargo.toml"; then rm "$new"; else mv "$new" "$folder/cargo.toml"; fi
echo "$folder/cargo.toml"
