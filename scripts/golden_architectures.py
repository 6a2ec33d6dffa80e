#!/usr/bin/env python3
"""Logits that transformers gives for one tiny model of every architecture and option.

    golden_architectures.py FILE            writes them
    golden_architectures.py FILE --check    computes them anew and compares

The weights come from a formula that the Rust test repeats, so only configs, shapes and logits are kept. Configs are as
the models on the hub have them, old spellings included.
"""
import json
import math
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

BASE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.25], "long_factor": [1.0, 2.0, 5.0, 11.0]}
GEMMA = {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "query_pre_attn_scalar": 24}
CASES = {
    "llama": ("llama", {}),
    "llama 2, one head each": ("llama", {"num_key_value_heads": 4, "rope_theta": 5e5, "attention_bias": True}),
    "llama 3.1 scaling, tied": ("llama", {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "mlp_bias": True}),
    "mistral, sliding": ("mistral", {"sliding_window": 9, "head_dim": 12}),
    "qwen2, sliding above": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2.5, yarn": ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0,
                                                 "original_max_position_embeddings": 64}}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "smollm3, sliding": ("smollm3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 8,
                                     "rope_theta": 5e6, "tie_word_embeddings": False}),
    "phi 3": ("phi3", {"sliding_window": 11, "num_key_value_heads": None}),
    "phi 3, longrope": ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}),
    "phi 4 mini": ("phi3", {"rope_scaling": LONGROPE | {"short_factor": [1.0, 1.3, 2.0], "long_factor": [1.0, 4.0, 9.0]},
                            "original_max_position_embeddings": 64, "partial_rotary_factor": 0.75,
                            "tie_word_embeddings": True}),
    "gemma 2": ("gemma2", GEMMA | {"sliding_window": 8}),
    "gemma 2, capped hard": ("gemma2", GEMMA | {"sliding_window": 8, "attn_logit_softcapping": 1.5,
                                                "final_logit_softcapping": 2.0, "num_key_value_heads": 4}),
    "gemma 3": ("gemma3_text", GEMMA | {"sliding_window": 7, "sliding_window_pattern": 2, "rope_theta": 1e5,
                                        "rope_local_base_freq": 500.0,
                                        "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
}
TOKENS = [(i * i * 31 + 7 * i + 5) % 96 for i in range(40)]
ROWS = [0, 1, 12, 39]


def noise(name, count):
    """Uniform in [-0.5, 0.5): FNV-1a of the name, then SplitMix64 of that plus the index."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)


def weights(model):
    tied = model.config.tie_word_embeddings
    gemma = "gemma" in model.config.model_type
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = noise(name, tensor.numel())
        if "norm" in name:
            values = np.float32(0.5) * values + np.float32(0 if gemma else 1)
        yield name, torch.from_numpy(values.reshape(tuple(tensor.shape)))


def case(kind, change):
    config = BASE | change
    config = {key: value for key, value in config.items() if value is not None or key == "num_key_value_heads"}
    known = CONFIG_MAPPING[kind].from_dict(json.loads(json.dumps(config)))
    model = AutoModelForCausalLM.from_config(known, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = dict(weights(model))
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    config = {"architectures": [type(model).__name__], "model_type": kind} | config
    return {"config": config, "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "logits": [[float(f"{v:.7g}") for v in logits[row].tolist()] for row in ROWS]}


def main():
    file = pathlib.Path(sys.argv[1])
    golden = {"tokens": TOKENS, "rows": ROWS, "cases": {name: case(*spec) for name, spec in CASES.items()}}
    if sys.argv[2:] == ["--check"]:
        kept = json.loads(file.read_text())
        worst = 0.0
        for name, found in golden["cases"].items():
            assert kept["cases"][name]["config"] == found["config"], name
            assert kept["cases"][name]["tensors"] == found["tensors"], name
            pairs = zip(sum(kept["cases"][name]["logits"], []), sum(found["logits"], []), strict=True)
            worst = max(worst, *(abs(a - b) for a, b in pairs))
        assert len(kept["cases"]) == len(CASES) and worst < 2e-5 and math.isfinite(worst), worst
        print(f"architectures: {len(CASES)} tiny models, kept logits within {worst:.1e} of transformers")
        return
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in golden["cases"].items()]
    file.write_text('{"tokens": %s, "rows": %s, "cases": {\n%s\n}}\n' % (TOKENS, ROWS, ",\n".join(lines)))
    print(f"{file}: {len(lines)} models")


if __name__ == "__main__":
    main()
