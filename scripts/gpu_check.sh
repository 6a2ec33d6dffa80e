#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: scripts/gpu_check.sh [FOLDER_OF_PROGRAMS [OUT [STAGE]]]
#
#   1. the tests of crates/lm on the GPU, with products of fixed shapes: logits of transformers, any company, seeds, ...
#   2. families in the GPU's memory: the CPU's bytes for every method the kernels know, and the speed of a point
#   3. the service over HTTP: families in the GPU's memory, saved and loaded again; more models than there is memory for
#   4. a GPU that was reset and opened anew
#   5. merges to disk through the GPU: the files of the CPU, and the time beside the CPU's
#   6. scoring and generation beside transformers on the same GPU
#   7. families of 7 and 13 billion parameters, and the first of them served
#
# STAGE is `most` (1 to 6), `large` (7) or `all` (default).
#
# Needs a machine with an NVIDIA GPU and python3 with torch, transformers, numpy; nothing from a network. The programs are
# built elsewhere by scripts/gpu_build.sh (default: target/gpu). Random checkpoints are made in /dev/shm (80 GB for 7). Prints
# tables, and writes OUT/*.json (default: target/gpu/out).
set -uo pipefail
cd "$(dirname "$0")/.."
programs=$(realpath "${1:-target/gpu}")
out=${2:-target/gpu/out}
stage=${3:-all}
mkdir -p "$out"
models=$(mktemp -d /dev/shm/cauldron.XXXXXX)
nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=500 >"$models/memory" &
watch=$!
trap 'kill "$watch"; rm -rf "$models"' EXIT
libraries=$(python3 -c "import sysconfig,glob;print(':'.join(glob.glob(sysconfig.get_paths()['purelib']+'/nvidia/*/lib')))")
export LD_LIBRARY_PATH=$libraries:/usr/local/cuda/lib64:${LD_LIBRARY_PATH:-}
failed=0
step() { echo; echo "== $* ($SECONDS s)"; }
check() { "$@" || { failed=1; echo "FAILED: $*"; }; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"

timed=$(python3 scripts/gpu_recipes.py "$models/recipes")

if [ "$stage" != large ]; then
step "the decoder's tests on the GPU"
# The golden tests need the demo's models (demo/prepare.sh).
skip=$([ -d target/demo/models ] || echo "--skip golden::")
# shellcheck disable=SC2086
check env CAULDRON_TEST_DEVICE=cuda "$programs/lm_tests" --test-threads=1 $skip

step "families: bytes of the CPU and of the GPU"
check python3 bench/random_llama.py "$models/small" 60000000 base a b c
"$programs/resident" "$models/small" CHECK "$models"/recipes/*.json | tee "$out/bytes.jsonl"
[ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "FAILED: bytes"; }

step "a GPU that was reset"
"$programs/resident" "$models/small" RESET "$models"/recipes/{task-mixed,dare-ties}.json | tee "$out/reset.jsonl"
[ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "FAILED: reset"; }

step "the service over HTTP"
python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' \
    "$programs/cauldron.xz" "$models/cauldron" && chmod +x "$models/cauldron"
python3 scripts/gpu_service.py "$models/cauldron" "$models/small" cuda:0 | tee "$out/service.txt"
[ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "FAILED: service"; }

step "merges to disk"
python3 scripts/gpu_merges.py "$models/cauldron" "$models/small" "$models/recipes" cuda:0 | tee "$out/merges.txt"
[ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "FAILED: merges"; }

step "families of 1.1 billion parameters: time of a point"
check python3 bench/random_llama.py "$models/large" 1100000000 base a b c
# shellcheck disable=SC2086
(cd "$models/recipes" && "$programs/resident" "$models/large" TIME $(printf '%s.json ' $timed)) | tee "$out/points.jsonl"
[ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "FAILED: families of 1.1 billion parameters"; }
python3 - <<'PYTHON' | tee "$out/copy.json"
import json, time, torch
a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
b = torch.empty_like(a)
times = []
for _ in range(20):
    torch.cuda.synchronize(); start = time.perf_counter(); b.copy_(a); torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
print(json.dumps({"copy_gb_per_s": 2 * a.numel() / sorted(times)[10] / 1e9, "gpu": torch.cuda.get_device_name()}))
PYTHON

step "merges to disk of 1.1 billion parameters"
# shellcheck disable=SC2086
python3 scripts/gpu_merges.py "$models/cauldron" "$models/large" "$models/recipes" cuda:0 $timed slerp | tee -a "$out/merges.txt"
[ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "FAILED: merges"; }

step "scoring and generation beside transformers"
python3 scripts/gpu_speed.py "$programs/speed" "$models/large/base" | tee "$out/speed.txt"
[ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "FAILED: speed"; }
rm -rf "$models/large"
fi

if [ "$stage" != most ]; then
step "7 billion parameters"
check python3 scripts/gpu_models.py "$models/7b" 7000000000 base a b
(cd "$models/recipes" && "$programs/resident" "$models/7b" TIME {task-mixed,ties-mixed,dare-ties}.json) | tee "$out/points-7b.jsonl"
[ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "FAILED: families of 7 billion parameters"; }
rm -rf "$models"/7b/{a,b}
python3 scripts/gpu_speed.py "$programs/speed" "$models/7b/base" score:16x512 decode:1x64 decode:32x64 decode:256x32 | tee "$out/speed-7b.txt"
[ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "FAILED: speed of 7 billion parameters"; }
rm -rf "$models/7b"
step "13 billion parameters"
# Half of the memory is what such a file system may have, unless it is told otherwise.
mount -o remount,size=90G /dev/shm 2>/dev/null || true
if [ "$(df --output=avail -BG /dev/shm | tail -1 | tr -dc 0-9)" -ge 76 ]; then
    check python3 scripts/gpu_models.py "$models/13b" 13000000000 base a b
    (cd "$models/recipes" && "$programs/resident" "$models/13b" TIME ties-mixed.json) | tee "$out/points-13b.jsonl"
    [ "${PIPESTATUS[0]}" = 0 ] || { failed=1; echo "FAILED: families of 13 billion parameters"; }
else
    failed=1
    echo "FAILED: /dev/shm has no room for three checkpoints of 13 billion parameters"
fi
fi
echo "most memory in use: $(sort -n "$models/memory" | tail -1) MiB" | tee "$out/memory.txt"
echo "== done ($SECONDS s), failed: $failed"
exit $failed
