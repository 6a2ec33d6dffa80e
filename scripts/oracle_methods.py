#!/usr/bin/env python3
"""mergekit and `cauldron merge` on the same YAML configs: every deterministic method, tensor by tensor, and the statistics
of the random ones (dare_*, della*).

    oracle_methods.py [--mergekit ENVIRONMENT] [--cauldron PROGRAM] [--only WORD] [--stable] [--self-check]

--mergekit    the virtual environment mergekit is taken from; default: the one this runs in (another version goes here)
--only        cases whose name contains WORD
--stable      mergekit's sorts are made stable: equal magnitudes stay in their places' order (its usual order is any)
--self-check  without Cauldron: in its place mergekit in float64 (shows how far float32 alone is from the exact result), for
              bfloat16 mergekit with stable sorts, for random masks mergekit with another seed

Run with the packages of requirements-mergekit.txt (mergekit==0.1.5, numpy==2.4.6; PyYAML==6.0.4 comes with mergekit);
scripts/oracle_mergekit.sh installs them. Models, configs and results are under target/oracle/tiny (ORACLE_ROOT: elsewhere); the models are random.

float32 results may differ by 1e-6; bfloat16 results (computed in float32, rounded once) by one unit in the last place, or
by 1e-6 where they cancel to almost 0.
Where mergekit selects by magnitude and equal magnitudes lie across its cut, it takes an arbitrary subset (its sort is not
stable); elements exactly at such a cut are counted as `tied`, not compared. The float32 models have no such elements.
"""
import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import traceback

import numpy as np
import yaml

ROOT = pathlib.Path(os.environ.get("ORACLE_ROOT", "target/oracle/tiny"))  # removed and written anew by each run
DATA = ROOT / "data"
CAULDRON = "target/debug/cauldron"

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 64, 4, 4, 2, 160, 320
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS, "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCAB, "max_position_embeddings": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}
SEED = 20
BASE_SCALE = 0.02
# expert: (noise of its own, share of the noise that all experts have in common)
EXPERTS = {"a": (1e-3, 0.6), "b": (1.5e-3, 0.6), "c": (7e-4, 0.6), "close1": (1e-5, 0.0), "close2": (1e-5, 0.0)}

TOLERANCE = 1e-6
ULPS = 1
SIGMAS = 4
# A selection score other than |delta| is itself rounded: scores this near to the cut count as tied.
SCORE_ROUNDING = 1e-5
# Of the divergence in Arcee Fusion, absolute; and the most elements that it may decide.
FUSION_ROUNDING = 8 * 2.0 ** -24
FUSION_SHARE = 0.03
# torch's AVX kernels contract the multiplication and addition of `linear` into one rounding; its baseline does not, nor do we.
MERGEKIT_ENVIRON = {"ATEN_CPU_CAPABILITY": "default", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
# case -> why Cauldron refuses what mergekit merges. It must refuse: a merge that leaves the setting out would be wrong.
UNSUPPORTED = {
    "linear, normalize gradient": "normalize holds for the whole model",
    "linear, normalize by filter": "normalize holds for the whole model",
    "linear, slice parameters": "normalize holds for the whole model",
    "linear, slices of 1 and 2": "mergekit leaves the last slice's extra sources out of the last norm and the head",
    "ties, rescale": "an L1 rescaling is a sparsifier's",
    "ties, density 0": "a parent of which nothing is kept is left out of the recipe",
    "dare_linear, density 0": "a parent of which nothing is kept is left out of the recipe",
    "multislerp, eps": "eps is fixed at mergekit's default",
}
# Where equal scores lie across cuts in bfloat16, and what is tied cannot be told: the densities differ by layer, or what is
# selected decides the weights of the whole tensor. Run in bfloat16 with --stable only; "sce 3" not even so, for its scores tie only up to rounding.
TIES_SPREAD = {"ties, density gradients", "ties, slices", "sce 2", "sce 3", "sce, int8_mask"}


# --- safetensors and checkpoints -------------------------------------------------------------------------------------

NUMPY_DTYPES = {"F32": np.float32, "BF16": np.uint16}  # bfloat16 stays bits


def write_safetensors(path, tensors):
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    names = {np.dtype(v): k for k, v in NUMPY_DTYPES.items()}
    for name, array in tensors.items():
        blob = array.tobytes()
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def read_safetensors(path):
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(raw[start + begin:start + end], NUMPY_DTYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return tensors


def read_checkpoint(folder):
    tensors = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        tensors.update(read_safetensors(file))
    return tensors


def to_bfloat16(array):
    """Bits of float32 values rounded to bfloat16, nearest even (finite values)."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(array):
    return array if array.dtype == np.float32 else (array.astype(np.uint32) << 16).view(np.float32)


def shapes():
    width = HIDDEN // HEADS
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield prefix + "self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "self_attn.k_proj.weight", (KV_HEADS * width, HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (KV_HEADS * width, HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
        yield prefix + "mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield prefix + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def duplicated(magnitudes):
    """Where a magnitude occurs more than once."""
    _, inverse, counts = np.unique(magnitudes, return_inverse=True, return_counts=True)
    return counts[inverse].reshape(magnitudes.shape) > 1


def expert_of(base, noise, rng, scale):
    """base + noise in float32 with all |delta| different, so that no two elements compete for a place at a cut."""
    for _ in range(200):
        expert = (base + noise).astype(np.float32)
        clash = duplicated(np.abs(expert - base))
        if not clash.any():
            break
        noise = np.where(clash, rng.normal(0, scale, base.shape), noise)
    return expert


def mirrored(base, expert, other, rng):
    """The expert's delta with the other sign at most elements, exactly; the other expert elsewhere."""
    mirror = base - (expert - base)
    wide = [x.astype(np.float64) for x in (mirror, base, expert)]
    exact = (wide[0] - wide[1] == wide[1] - wide[2]) & (rng.random(base.shape) < 0.7)
    return np.where(exact, mirror, other)


def tiny_models():
    """name -> tensor -> float32. `base` and experts of it; `zero` and `n1`, `n2`, whose deltas from it are exact."""
    rng = np.random.default_rng(SEED)
    models = {}
    for tensor, shape in shapes():
        def noise(scale, shape=shape):
            return rng.normal(0, scale, shape)
        norm = len(shape) == 1
        found = {"base": (1 + noise(0.1) if norm else noise(BASE_SCALE)).astype(np.float32)}
        common = noise(1.0)
        for expert, (scale, share) in EXPERTS.items():
            own = noise(scale) + share * scale * common
            close = expert.startswith("close")
            found[expert] = (found["base"] + own).astype(np.float32) if close else expert_of(found["base"], own, rng, scale)
        found["mirror"] = mirrored(found["base"], found["a"], found["b"], rng)
        found["zero"] = np.zeros(shape, np.float32)
        for name in ("n1", "n2"):
            found[name] = expert_of(found["zero"], noise(1e-3), rng, 1e-3)
        for name, array in found.items():
            models.setdefault(name, {})[tensor] = array
    return models


def make_checkpoints(root=ROOT):
    """Writes all models under root/float32 and root/bfloat16."""
    for name, tensors in tiny_models().items():
        for dtype in ("float32", "bfloat16"):
            folder = root / dtype / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}, indent=1))
            stored = tensors if dtype == "float32" else {k: to_bfloat16(v) for k, v in tensors.items()}
            write_safetensors(folder / "model.safetensors", stored)


# --- cases -----------------------------------------------------------------------------------------------------------

def models(method, parents, base=None, **parameters):
    """A config with `models:`; parents is name -> parameters."""
    config = {"merge_method": method, "models": [
        {"model": name} | ({"parameters": own} if own else {}) for name, own in parents.items()]}
    return config | ({"base_model": base} if base else {}) | ({"parameters": parameters} if parameters else {})


def slices(method, *cuts, base=None, **parameters):
    """A config with `slices:`; each cut is a list of (model, (from, to), parameters), or a pair of it and the slice's own."""
    out = []
    for cut in cuts:
        sources, own = cut if isinstance(cut, tuple) else (cut, None)
        out.append({"sources": [{"model": model, "layer_range": list(layers)} | ({"parameters": parameters} if parameters else {})
                                for model, layers, parameters in sources]} | ({"parameters": own} if own else {}))
    config = {"merge_method": method, "slices": out}
    return config | ({"base_model": base} if base else {}) | ({"parameters": parameters} if parameters else {})


def weights(**values):
    return {name: {"weight": value} for name, value in values.items()}


def ties(density, **values):
    return {name: {"weight": value, "density": density} for name, value in values.items()}


README_T = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]
STOCK2, STOCK3 = {"a": {}, "b": {}}, {"a": {}, "b": {}, "c": {}}

CASES = {
    "linear 2": models("linear", weights(a=0.7, b=0.3)),
    "linear 2, sum not 1": models("linear", weights(a=0.7, b=0.9)),
    "linear 2, not normalized": models("linear", weights(a=0.7, b=0.2), normalize=False),
    "linear 3": models("linear", weights(a=0.5, b=1.0, c=0.25)),
    "linear 3, not normalized": models("linear", weights(a=0.5, b=0.3, c=-0.1), normalize=False),
    "linear of base and 2": models("linear", weights(base=1.0, a=0.4, b=0.6)),
    "linear, weight 0": models("linear", weights(a=1.0, b=0.0)),
    "linear, gradients": models("linear", weights(a=[0.0, 1.0], b=[1.0, 0.2, 0.4])),
    "linear, filters": models("linear", {
        "a": {"weight": [{"filter": "mlp", "value": [0.1, 0.9]}, {"filter": "q_proj", "value": 0.8}, {"value": 0.25}]},
        "b": {"weight": [{"filter": "mlp"} | {"value": 0.5}, {"filter": "*", "value": 1.0}]}}),
    "linear, filter falls through": models("linear", {
        "a": {"weight": [{"filter": "self_attn", "value": 0.9}]}, "b": {}}, weight=0.4),
    "linear, filters on lm_head and norms": models("linear", {
        "a": {"weight": [{"filter": "lm_head", "value": 1.0}, {"filter": "embed_tokens", "value": 0.0}, {"filter": "norm", "value": 0.6}, {"value": 0.5}]},
        "b": {"weight": [{"filter": "lm_head", "value": 0.0}, {"value": 0.5}]}}),
    "linear, filter is no regex": models("linear", {"a": {"weight": [{"filter": "layers.*mlp", "value": 1.0}, {"value": 0.5}]}, "b": {"weight": 0.5}}),
    "linear, numbers as strings": models("linear", {"a": {"weight": "0.5"}, "b": {"weight": "1e-1"}}),
    "linear, base joins": models("linear", weights(a=0.7, b=0.3), base="base", weight=0.5),
    "linear, normalize gradient": models("linear", weights(a=0.7, b=0.7), normalize=[True, False]),
    "linear, normalize by filter": models("linear", weights(a=0.7, b=0.7), normalize=[{"filter": "mlp", "value": False}, {"value": True}]),

    "task arithmetic 1": models("task_arithmetic", weights(a=0.6), base="base"),
    "task arithmetic 2": models("task_arithmetic", weights(a=0.6, b=0.5), base="base"),
    "task arithmetic 3, lambda": models("task_arithmetic", weights(a=0.6, b=-0.5, c=1.2), base="base", **{"lambda": 0.7}),
    "task arithmetic, normalize": models("task_arithmetic", weights(a=0.6, b=0.9), base="base", normalize=True),
    "task arithmetic, sum 0, normalize": models("task_arithmetic", weights(a=0.5, b=-0.5), base="base", normalize=True),
    "task arithmetic, base listed": models("task_arithmetic", {"base": {}} | weights(a=0.6, b=0.5), base="base"),
    "task arithmetic, gradient": models("task_arithmetic", weights(a=[0, 0.5, 1.0], b=0.5), base="base"),
    "task arithmetic, lambda gradient": models("task_arithmetic", weights(a=0.5, b=0.5), base="base", **{"lambda": [0.2, 1.4]}),

    "ties 1 .5": models("ties", ties(0.5, a=1.0), base="base"),
    "ties 2 .5": models("ties", ties(0.5, a=1.0, b=1.0), base="base"),
    "ties 2 .5 default density": models("ties", weights(a=1.0, b=1.0), base="base"),
    "ties 2 .7 weights": models("ties", ties(0.7, a=0.4, b=0.9), base="base"),
    "ties 2 .7, not normalized": models("ties", ties(0.7, a=0.4, b=0.9), base="base", normalize=False),
    "ties 3 .5 weights": models("ties", ties(0.5, a=0.3, b=0.9, c=0.6), base="base"),
    "ties 3 .7, not normalized": models("ties", ties(0.7, a=0.3, b=0.9, c=0.6), base="base", normalize=False),
    "ties, lambda": models("ties", ties(0.5, a=1.0, b=0.5), base="base", **{"lambda": 0.6}),
    "ties, int8_mask": models("ties", ties(0.5, a=1.0, b=0.5), base="base", int8_mask=True),
    "ties, rescale": models("ties", ties(0.5, a=1.0, b=0.5), base="base", rescale=True),
    "ties, negative weight": models("ties", ties(0.5, a=1.0, b=-0.4), base="base"),
    "ties, sums of 0": models("ties", ties(1.0, a=1.0, mirror=1.0), base="base"),
    "ties, density almost 0": models("ties", ties(1e-6, a=1.0, b=0.5), base="base"),
    "ties, density 0": models("ties", ties(0.0, a=1.0) | ties(0.5, b=0.5), base="base"),
    "ties, density gradients": models("ties", {
        "a": {"weight": 1.0, "density": [1.0, 0.7, 0.1]}, "b": {"weight": [0, 0.3, 0.7, 1], "density": 0.5},
        "c": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}], "density": 0.33}}, base="base", normalize=True, int8_mask=True),

    "slerp .4": models("slerp", {"base": {}, "a": {}}, base="base", t=0.4),
    "slerp, base second": models("slerp", {"a": {}, "base": {}}, base="base", t=0.4),
    "slerp of experts": models("slerp", {"a": {}, "b": {}}, base="a", t=0.25),
    "slerp, base not listed": models("slerp", {"a": {}}, base="base", t=0.4),
    "slerp 0": models("slerp", {"a": {}, "b": {}}, base="a", t=0.0),
    "slerp, far apart": models("slerp", {"n1": {}, "n2": {}}, base="n1", t=0.3),
    "slerp, one zero": models("slerp", {"zero": {}, "n2": {}}, base="zero", t=0.3),
    "slerp, close": models("slerp", {"close1": {}, "close2": {}}, base="close1", t=0.3),
    "slerp, gradient and filters": models("slerp", {"a": {}, "b": {}}, base="a", t=README_T),
    "slerp, slices": slices("slerp", [("a", (0, 4), None), ("b", (0, 4), None)], base="a", t=README_T),

    "nuslerp": models("nuslerp", weights(a=0.7, b=0.4)),
    "nuslerp, sum 0": models("nuslerp", weights(a=0.5, b=-0.5)),
    "nuslerp, far apart": models("nuslerp", weights(n1=0.7, n2=0.4)),
    "nuslerp, not flat": models("nuslerp", weights(a=0.7, b=0.4), nuslerp_flatten=False),
    "nuslerp, row_wise": models("nuslerp", weights(a=0.7, b=0.4), nuslerp_flatten=False, nuslerp_row_wise=True),
    "nuslerp, flat wins over row_wise": models("nuslerp", weights(a=0.7, b=0.4), nuslerp_row_wise=True),
    "nuslerp, base": models("nuslerp", weights(a=0.7, b=0.4), base="base"),
    "nuslerp, base, not flat": models("nuslerp", weights(a=0.7, b=0.4), base="base", nuslerp_flatten=False),
    "nuslerp, base, row_wise": models("nuslerp", weights(a=0.7, b=0.4), base="base", nuslerp_flatten=False, nuslerp_row_wise=True),
    "nuslerp, same": models("nuslerp", weights(close1=0.7, close2=0.4), nuslerp_flatten=False),

    "multislerp 2": models("multislerp", weights(a=0.7, b=0.4)),
    "multislerp 3": models("multislerp", weights(a=0.7, b=0.4, c=0.2)),
    "multislerp 3, not normalized": models("multislerp", weights(a=0.7, b=0.4, c=0.2), normalize_weights=False),
    "multislerp 3, base": models("multislerp", weights(a=0.7, b=0.4, c=0.2), base="base"),
    "multislerp 1, base": models("multislerp", weights(a=0.7), base="base"),
    "multislerp, far apart": models("multislerp", weights(n1=0.7, n2=0.4)),
    "multislerp, close": models("multislerp", weights(close1=0.7, close2=0.4)),
    "multislerp, eps": models("multislerp", weights(a=0.7, b=0.4, c=0.2), base="base", eps=1e-3),

    "karcher 2": models("karcher", STOCK2),
    "karcher 3": models("karcher", STOCK3),
    "karcher, far apart": models("karcher", {"n1": {}, "n2": {}, "a": {}}),
    "karcher, 2 iterations": models("karcher", {"n1": {}, "n2": {}, "a": {}}, max_iter=2),
    "karcher, tol": models("karcher", {"n1": {}, "n2": {}, "a": {}}, tol=1e-2),
    "karcher, base joins": models("karcher", STOCK2, base="base"),
    "karcher, one zero": models("karcher", {"zero": {}, "n1": {}, "n2": {}}),

    "model_stock 2": models("model_stock", STOCK2, base="base"),
    "model_stock 3": models("model_stock", STOCK3, base="base"),
    "model_stock 2, filter_wise": models("model_stock", STOCK2, base="base", filter_wise=True),
    "model_stock 3, filter_wise": models("model_stock", STOCK3, base="base", filter_wise=True),
    "model_stock 3, base listed": models("model_stock", {"a": {}, "base": {}, "b": {}, "c": {}}, base="base"),
    "model_stock, close": models("model_stock", {"close1": {}, "close2": {}}, base="base", filter_wise=True),
    "model_stock, opposed": models("model_stock", {"a": {}, "mirror": {}}, base="base"),

    "breadcrumbs 1": models("breadcrumbs", {"a": {"weight": 1.0, "density": 0.7, "gamma": 0.05}}, base="base"),
    "breadcrumbs 2": models("breadcrumbs", {"a": {"weight": 0.6, "density": 0.7, "gamma": 0.05},
                                            "b": {"weight": 0.9, "density": 0.5, "gamma": 0.1}}, base="base"),
    "breadcrumbs, default gamma": models("breadcrumbs", ties(0.9, a=0.5, b=0.5), base="base"),
    "breadcrumbs, gamma too large": models("breadcrumbs", ties(0.9, a=0.5, b=0.5), base="base", gamma=0.3),
    "breadcrumbs, normalize": models("breadcrumbs", ties(0.9, a=0.5, b=0.9), base="base", normalize=True),
    "breadcrumbs, rescale": models("breadcrumbs", ties(0.5, a=0.5, b=0.9), base="base", rescale=True),
    "breadcrumbs_ties 2": models("breadcrumbs_ties", {"a": {"weight": 0.6, "density": 0.7, "gamma": 0.05},
                                                      "b": {"weight": 0.9, "density": 0.5, "gamma": 0.1}}, base="base"),
    "breadcrumbs_ties 3, lambda": models("breadcrumbs_ties", ties(0.6, a=0.6, b=0.9, c=0.4), base="base", **{"lambda": 0.8, "gamma": 0.02}),
    "breadcrumbs_ties, normalize": models("breadcrumbs_ties", ties(0.6, a=0.6, b=0.9), base="base", normalize=True),

    "sce 2": models("sce", STOCK2, base="base", select_topk=0.5),
    "sce 3": models("sce", STOCK3, base="base", select_topk=0.3),
    "sce, default": models("sce", STOCK3, base="base"),
    "sce 1": models("sce", {"a": {}}, base="base", select_topk=0.5),
    "sce, topk 0": models("sce", STOCK2, base="base", select_topk=0.0),
    "sce, int8_mask": models("sce", STOCK2, base="base", select_topk=0.5, int8_mask=True),
    "sce, large deltas": models("sce", {"base": {}, "a": {}}, base="zero"),

    "nearswap": models("nearswap", {"base": {}, "a": {}}, base="base", t=5e-4),
    "nearswap, base not listed": models("nearswap", {"a": {}}, base="base", t=5e-4),
    "nearswap, close": models("nearswap", {"base": {}, "close1": {}}, base="base", t=5e-6),
    "nearswap, gradient": models("nearswap", {"base": {}, "a": {}}, base="base", t=[1e-4, 1e-3]),

    "dare_linear, density 1": models("dare_linear", ties(1.0, a=0.6, b=0.9), base="base", **{"lambda": 0.8}),
    "dare_ties, density 1": models("dare_ties", ties(1.0, a=0.6, b=0.9, c=0.5), base="base"),
    "dare_ties, density 1, normalize": models("dare_ties", ties(1.0, a=0.6, b=0.9), base="base", normalize=True),
    "dare_linear, density 0": models("dare_linear", ties(0.0, a=0.6) | ties(1.0, b=0.9), base="base"),
    "della, density 1": models("della", ties(1.0, a=0.6, b=0.9, c=0.5), base="base"),
    "della_linear, density 1": models("della_linear", ties(1.0, a=0.6, b=0.9), base="base"),

    "arcee_fusion": models("arcee_fusion", {"base": {}, "a": {}}, base="base"),
    "arcee_fusion, far apart": models("arcee_fusion", {"base": {}, "n1": {}}, base="base"),

    "passthrough": models("passthrough", {"a": {}}),
    "passthrough, scale": models("passthrough", {"a": {"scale": 0.5}}),
    "passthrough, stacked": slices("passthrough", [("a", (0, 3), None)], [("b", (1, 4), None)]),
    "passthrough, one layer twice": slices("passthrough", [("a", (0, 2), None)], [("a", (1, 4), None)]),
    "passthrough, stacked and scaled": slices("passthrough", [("a", (0, 3), None)], [("b", (1, 4), {
        "scale": [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]})], [("a", (3, 4), None)]),
    "passthrough, scale gradient": slices("passthrough", [("a", (0, 4), {"scale": [0.5, 2.0]})]),
    "passthrough, single layers": slices("passthrough", [("a", (0, 1), {"scale": [0.5, 2.0]})], [("b", (3, 4), None)]),

    "linear, slices": slices("linear", [("a", (0, 2), {"weight": 0.7}), ("b", (2, 4), {"weight": 0.3})],
                             [("c", (0, 3), {"weight": [0.0, 1.0]}), ("b", (1, 4), {"weight": 0.5})]),
    # The norm and lm_head take as many sources of the last slice as the first slice has.
    "linear, slices of 1 and 2": slices("linear", [("a", (0, 2), {"weight": 1.0})], [("a", (2, 4), {"weight": 0.5}), ("b", (2, 4), {"weight": 0.5})]),
    "linear, slices of 2 and 1": slices("linear", [("a", (0, 2), {"weight": 0.5}), ("b", (0, 2), {"weight": 0.5})], [("b", (2, 4), {"weight": 1.0})]),
    "linear, slice parameters": slices("linear", ([("a", (0, 2), None), ("b", (0, 2), {"weight": 0.3})], {"weight": 0.9}),
                                       ([("a", (2, 4), None), ("b", (2, 4), None)], {"normalize": False}), weight=0.4),
    "ties, slices": slices("ties", [("a", (0, 2), {"weight": 0.7, "density": 0.5}), ("b", (0, 2), {"weight": 0.3, "density": 0.7}), ("base", (0, 2), None)],
                           [("a", (1, 4), {"weight": 0.7, "density": 0.5}), ("c", (1, 4), {"weight": 0.3, "density": [0.2, 0.9]}), ("base", (1, 4), None)], base="base"),
}

# Configs that mergekit refuses, and why: not compared, but what Cauldron does with them is shown.
REFUSED = {
    "linear, base without weight": (models("linear", weights(a=0.7, b=0.3), base="base"), "base_model joins the inputs, and every input needs a weight"),
    "linear, filters without default": (models("linear", {"a": {"weight": [{"filter": "mlp", "value": 1.0}]}, "b": {"weight": 0.5}}), "no weight for the other tensors"),
    "linear, model twice": ({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 0.5}}] * 2}, "inputs must differ"),
    "linear, uneven slices": (slices("linear", [("a", (0, 2), {"weight": 0.5}), ("b", (0, 3), {"weight": 0.5})]), "sources of a slice have equally many layers"),
    "passthrough, base given": (models("passthrough", {"a": {}}, base="base"), "base_model joins the inputs; passthrough takes one"),
    "passthrough 2": (models("passthrough", STOCK2), "passthrough takes one input"),
    "passthrough, no such layers": (slices("passthrough", [("a", (0, 6), None)]), "the model has four layers"),
    "slerp 3": (models("slerp", STOCK3, base="a", t=0.3), "slerp takes two"),
    "slerp without base": (models("slerp", STOCK2, t=0.3), "base_model is needed"),
    "slerp without t": (models("slerp", STOCK2, base="a"), "t has no default"),
    "ties without base": (models("ties", ties(0.5, a=1.0, b=1.0)), "base_model is needed"),
    "ties without weight": (models("ties", {"a": {"density": 0.5}}, base="base"), "weight has no default"),
    "ties, base not in slices": (slices("ties", [("a", (0, 4), {"weight": 1.0}), ("b", (0, 4), {"weight": 1.0})], base="base"), "slices must name the base"),
    "model_stock 1": (models("model_stock", {"a": {}}, base="base"), "at least two experts"),
    "nuslerp 3": (models("nuslerp", weights(a=1.0, b=1.0, c=1.0)), "nuslerp takes two"),
    "nuslerp without weight": (models("nuslerp", STOCK2), "weight has no default"),
    "della, epsilon too large": (models("della", {"a": {"weight": 1.0, "density": 0.9, "epsilon": 0.2}}, base="base"), "density +- epsilon must be in (0, 1)"),
}


def random_case(method, parents, base="zero", **parameters):
    return models(method, parents, base=base, **parameters)


# Against `zero` a result is the sparse delta itself, exactly.
RANDOM_CASES = {
    "dare_linear 1": random_case("dare_linear", {"n1": {"weight": 1.0, "density": 0.3}}),
    "dare_linear 1, not rescaled": random_case("dare_linear", {"n1": {"weight": 1.0, "density": 0.7}}, rescale=False),
    "dare_linear 2": random_case("dare_linear", {"n1": {"weight": 0.7, "density": 0.6}, "n2": {"weight": 0.4, "density": 0.8}}, rescale=False),
    "dare_ties 1": random_case("dare_ties", {"n1": {"weight": 1.0, "density": 0.5}}),
    "dare_ties 2": random_case("dare_ties", {"n1": {"weight": 0.7, "density": 0.6}, "n2": {"weight": 0.4, "density": 0.8}}, rescale=False),
    "dare_ties 2, normalize": random_case("dare_ties", {"n1": {"weight": 0.7, "density": 0.6}, "n2": {"weight": 0.4, "density": 0.8}}, rescale=False, normalize=True),
    "dare_linear, gradient": random_case("dare_linear", {"n1": {"weight": 1.0, "density": [0.2, 0.9]}}),
    "della_linear 1": random_case("della_linear", {"n1": {"weight": 1.0, "density": 0.5, "epsilon": 0.2}}),
    "della_linear 1, not rescaled": random_case("della_linear", {"n1": {"weight": 1.0, "density": 0.6, "epsilon": 0.3}}, rescale=False),
    "della_linear, default epsilon": random_case("della_linear", {"n1": {"weight": 1.0, "density": 0.5}}),
    "della 1": random_case("della", {"n1": {"weight": 0.5, "density": 0.5, "epsilon": 0.2}}),
    "della 2": random_case("della", {"n1": {"weight": 0.7, "density": 0.6, "epsilon": 0.1}, "n2": {"weight": 0.4, "density": 0.7, "epsilon": 0.1}},
                           rescale=False, normalize=False),
}


def in_dtype(config, dtype):
    """bfloat16 is computed in float32 and rounded once by both tools."""
    return config | ({"dtype": "float32"} if dtype == "float32" else {"dtype": "float32", "out_dtype": "bfloat16"})


# --- the two tools ---------------------------------------------------------------------------------------------------

def mergekit(environment, dtype, configs, seed=1, stable=False):
    """Runs mergekit-yaml on many configs in one process; name -> folder, or the error as a string."""
    jobs = []
    for name, config in configs.items():
        out = ROOT / "mergekit" / f"{dtype} {seed} {name}".replace(" ", "_")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        jobs.append({"name": name, "config": str((out / "config.yaml").absolute()), "out": str((out / "merged").absolute())})
    python = pathlib.Path(environment) / "bin/python"
    environ = MERGEKIT_ENVIRON | os.environ
    command = [python, pathlib.Path(__file__).absolute(), "--run-mergekit", str(seed)] + ["stable"] * stable
    done = subprocess.run(command, input=json.dumps(jobs), text=True, stdout=subprocess.PIPE, cwd=ROOT / dtype, env=environ, check=True)
    results = json.loads(done.stdout.splitlines()[-1])
    return {job["name"]: results[job["name"]] or pathlib.Path(job["out"]) for job in jobs}


def make_sorts_stable():
    """torch's sorts put equal elements in any order, by processor and size; here the first stay first."""
    import torch

    sort = torch.sort
    torch.sort = lambda x, dim=-1, descending=False: sort(x, dim=dim, descending=descending, stable=True)
    torch.argsort = torch.Tensor.argsort = lambda x, dim=-1, descending=False: torch.sort(x, dim, descending).indices
    torch.topk = lambda x, k, largest=True: tuple(part[:k] for part in torch.sort(x, -1, largest))


def run_mergekit(seed, stable):
    """In mergekit's environment: the command mergekit-yaml for each job of standard input, one import for all."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    if stable:
        make_sorts_stable()
    errors = {}
    for job in json.load(sys.stdin):
        # The card would ask the hub about each model. Layers that occur twice need clones: safetensors refuses shared memory.
        arguments = [job["config"], job["out"], "--no-write-model-card", "--no-copy-tokenizer", "--clone-tensors",
                     "--random-seed", str(seed), "--quiet"]
        try:
            mergekit_yaml(arguments, standalone_mode=False)
            errors[job["name"]] = None
        except Exception as error:
            errors[job["name"]] = f"{type(error).__name__}: {error}"
            traceback.print_exc(file=sys.stderr) if os.environ.get("TRACE") else None
    print("\n" + json.dumps(errors))


def ours(config, dtype="float32", program=CAULDRON):
    """The folder that `cauldron merge` made of a mergekit config or a recipe (a dict with `method`), or the error as a string."""
    file = ROOT / ("recipe.json" if "method" in config else "config.yaml")
    file.write_text(json.dumps(config) if "method" in config else yaml.safe_dump(config, sort_keys=False))
    command = [program, "merge", file, "--models-dir", ROOT / dtype, "--data-dir", DATA, "--log", "error"]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode != 0:
        return (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    return pathlib.Path(json.loads(done.stdout.splitlines()[-1])["path"])


# --- elements at a cut -----------------------------------------------------------------------------------------------

def at_cuts(scores, start, stop, rounding):
    """Elements that may or may not be among the scores[start:stop] in ascending order: equal scores lie across the cut."""
    ordered = np.sort(scores, axis=None)
    found = np.zeros(scores.shape, bool)
    for cut in (start, stop):
        if 0 < cut < ordered.size and ordered[cut] - ordered[cut - 1] <= rounding * ordered[cut]:
            found |= np.abs(scores - ordered[cut]) <= rounding * ordered[cut]
    return found


def constant(config, parent, name, default):
    value = (parent.get("parameters") or {}).get(name, (config.get("parameters") or {}).get(name, default))
    return value if isinstance(value, (int, float)) else None


def tied_elements(config, inputs, tensor):
    """Elements whose selection the method leaves open, for the methods that select by rank with constant densities."""
    method = config["merge_method"]
    if "models" not in config or method not in ("ties", "breadcrumbs", "breadcrumbs_ties", "sce", "arcee_fusion"):
        return np.False_
    base = widen(inputs[config["base_model"]][tensor])
    found = np.zeros(base.shape, bool)
    parents = [p for p in config["models"] if p["model"] != config["base_model"]]
    deltas = [widen(inputs[p["model"]][tensor]) - base for p in parents]
    if method == "sce":
        return found | sce_ties(deltas, constant(config, {}, "select_topk", 1.0))
    if method == "arcee_fusion":
        return fusion_ties(base, widen(inputs[parents[0]["model"]][tensor]))
    for parent, delta in zip(parents, deltas):
        density, gamma = constant(config, parent, "density", 1.0), constant(config, parent, "gamma", 0.01)
        if density is None or density >= 1 or density <= 0:
            continue
        if method == "ties":
            keep = max(1, int(density * delta.size))
            start = delta.size - keep
        else:
            keep = int(density * delta.size)
            start = max(0, delta.size - keep - int(gamma * delta.size))
        found |= at_cuts(np.abs(delta), start, start + keep, 0)
    return found


def sce_ties(deltas, topk):
    variance = np.var(np.stack(deltas), axis=0, dtype=np.float64)
    keep = int(np.count_nonzero(variance) * topk)
    return at_cuts(variance, variance.size - keep, variance.size, SCORE_ROUNDING) if topk < 1 else False


def fusion_ties(base, expert):
    """Arcee Fusion weighs |delta| by a KL divergence of whole rows that is little above the rounding of float32: what
    that rounding may turn round is open (1.7 percent of the elements of `a`, 0.005 percent of `n1`)."""
    def softmax(x):
        x = np.exp(x - x.max(axis=-1, keepdims=True))
        return x / x.sum(axis=-1, keepdims=True) + 1e-8

    base, expert = base.astype(np.float64), expert.astype(np.float64)
    p, q = softmax(expert), softmax(base)
    divergence = (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    score = np.abs(expert - base) * divergence
    ordered = np.sort(score, axis=None)
    first, median, third = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (third - first)
    slack = FUSION_ROUNDING * (np.abs(expert - base) + threshold / np.median(divergence))
    return np.abs(score - threshold) <= slack


# --- comparison of elements ------------------------------------------------------------------------------------------

def ordered_bits(bits):
    """bfloat16 bits as integers in the order of the values, so that neighbours differ by 1."""
    signed = bits.view(np.int16).astype(np.int32)
    return np.where(signed < 0, -32768 - signed, signed)


def difference(a, b):
    """Elementwise: absolute in float32; in bfloat16 units in the last place, at most 1 of them within TOLERANCE."""
    apart = np.abs(widen(a).astype(np.float64) - widen(b).astype(np.float64))
    if a.dtype == np.uint16:
        units = np.abs(ordered_bits(a) - ordered_bits(b)).astype(np.float64)
        return np.where(apart <= TOLERANCE, np.minimum(units, ULPS), np.where(np.isfinite(apart), units, np.inf))
    return apart


def layers_of(folder):
    return json.loads((folder / "config.json").read_text())["num_hidden_layers"]


def compare(config, dtype, inputs, left, right):
    """A row of the table from two folders: (elements, differing, tied, largest difference and where, what is wrong)."""
    a, b = read_checkpoint(left), read_checkpoint(right)
    if a.keys() != b.keys():
        return 0, 0, 0, "", f"tensors of one only: {sorted(a.keys() ^ b.keys())[:4]}"
    wrong = [] if layers_of(left) == layers_of(right) else ["num_hidden_layers in config.json"]
    limit = TOLERANCE if dtype == "float32" else ULPS
    elements = differing = tied = 0
    worst, where = 0.0, "-"
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            return 0, 0, 0, "", f"{name}: {x.dtype} {x.shape} against {y.dtype} {y.shape}"
        apart = difference(x, y)
        if not np.isfinite(apart).all():
            return 0, 0, 0, "", f"{name}: not finite"
        ties_here = tied_elements(config, inputs, name)
        excused = ties_here & (apart > limit)
        if excused.any() and len(config["models"]) == 1 and changed(x, config, inputs, name) != changed(y, config, inputs, name):
            wrong.append(f"{name}: another number of elements kept")
        apart = np.where(excused, 0, apart)
        elements, differing, tied = elements + x.size, differing + int((apart > 0).sum()), tied + int(excused.sum())
        if apart.max() > worst:
            worst, where = float(apart.max()), name
    if worst > limit:
        wrong.append(f"beyond {limit:g}")
    if config["merge_method"] == "arcee_fusion":
        wrong += [f"{tied} elements are decided otherwise"] * (tied > FUSION_SHARE * elements) + stray(config, inputs, a, limit)
    return elements, differing, tied, f"{worst:.3g} {where if worst > limit else ''}", "; ".join(wrong[:3])


def stray(config, inputs, result, limit):
    """Arcee Fusion: the tensors with elements that are neither the base's nor the expert's."""
    base, expert = (inputs[parent["model"]] for parent in config["models"])
    return [f"{name}: a value of neither model" for name, x in result.items()
            if (np.minimum(difference(x, base[name]), difference(x, expert[name])) > limit).any()]


def changed(result, config, inputs, name):
    return int((result != inputs[config["base_model"]][name]).sum())


# --- statistics of random masks --------------------------------------------------------------------------------------

def beyond(count, trials, probability=None, variance=None):
    """How many sigmas a count is from its expectation."""
    expected = trials * probability if variance is None else probability
    variance = trials * probability * (1 - probability) if variance is None else variance
    return abs(count - expected) / max(np.sqrt(variance), 1e-12)


def resolved_density(value, layer):
    """A constant, or a gradient of two values; tensors outside the layers have t = 0."""
    if not isinstance(value, list):
        return value
    t = (layer or 0) / (LAYERS - 1)
    return (1 - t) * value[0] + t * value[1]


def layer_of(tensor):
    return int(tensor.split(".")[2]) if ".layers." in tensor else None


def keep_probabilities(method, parent, delta, tensor):
    """What each element's chance to be kept should be."""
    density = resolved_density(parent["density"], layer_of(tensor))
    if not method.startswith("della"):
        return np.full(delta.shape, density)
    epsilon = parent.get("epsilon", 0.15)
    rows = np.abs(delta.reshape(-1, delta.shape[-1]))
    ranks = rows.argsort(axis=1).argsort(axis=1) / (rows.shape[1] - 1)
    return (density - epsilon + ranks * 2 * epsilon).reshape(delta.shape)


def check_one_parent(config, inputs, result):
    """Density for each tensor, the ramp by rank, and what survivors are; the failures and the largest sigma."""
    method, parent = config["merge_method"], config["models"][0]
    own, shared = parent["parameters"], config.get("parameters") or {}
    rescale = shared.get("rescale", True)
    scale = 1.0 if method == "della" else own["weight"]  # della normalizes by default
    failures, sigmas, all_kept, all_chances = [], [], [], []
    for name, theta in inputs[parent["model"]].items():
        delta, found = widen(theta).astype(np.float64), widen(result[name]).astype(np.float64)
        chances, kept = keep_probabilities(method, own, widen(theta), name), found != 0
        sigmas.append((beyond(kept.sum(), 0, chances.sum(), (chances * (1 - chances)).sum()), name))
        all_kept.append(kept.ravel())
        all_chances.append(chances.ravel())
        wanted = scale * delta * kept
        if rescale:
            wanted *= np.abs(delta).sum() / np.abs(delta[kept]).sum()
        if not np.allclose(found, wanted, rtol=1e-5, atol=0):
            failures.append(f"{name}: survivors are not the {'rescaled ' if rescale else ''}delta")
    kept, chances = np.concatenate(all_kept), np.concatenate(all_chances)
    sigmas.append((beyond(kept.sum(), 0, chances.sum(), (chances * (1 - chances)).sum()), "overall"))
    edges = np.quantile(chances, np.linspace(0, 1, 11))
    for low, high in zip(edges, edges[1:]):
        inside = (chances >= low) & (chances <= high)
        p = chances[inside]
        sigmas.append((beyond(kept[inside].sum(), 0, p.sum(), (p * (1 - p)).sum()), f"kept with chance {low:.2f}..{high:.2f}"))
    return failures, sigmas


def check_two_parents(config, inputs, result):
    """Not rescaled: each result is one of the outcomes of two independent masks, as often as expected."""
    method = config["merge_method"]
    normalize = (config.get("parameters") or {}).get("normalize", method == "della")
    sides, chances = [], []
    for parent in config["models"]:
        own, tensors = parent["parameters"], inputs[parent["model"]]
        sides.append(np.concatenate([own["weight"] * widen(t).astype(np.float64).ravel() for t in tensors.values()]))
        chances.append(np.concatenate([keep_probabilities(method, own, widen(t), n).ravel() for n, t in tensors.items()]))
    found = np.concatenate([widen(result[n]).astype(np.float64).ravel() for n in inputs["n1"]])
    (a, b), (p, q) = sides, chances
    wa, wb = (m["parameters"]["weight"] for m in config["models"])
    one, two, both = (a / wa, b / wb, (a + b) / (wa + wb)) if normalize else (a, b, a + b)
    elects = "linear" not in method
    clash = (np.sign(a) != np.sign(b)) & elects
    both = np.where(clash, np.where(np.abs(a) > np.abs(b), one, two), both)
    a_wins = np.abs(a) > np.abs(b)
    # (name, value, chance); with a clash, keeping both gives the larger one alone.
    outcomes = [("none", 0 * a, (1 - p) * (1 - q)),
                ("first", one, np.where(clash & a_wins, p, p * (1 - q))),
                ("second", two, np.where(clash & ~a_wins, q, q * (1 - p))),
                ("both", np.where(clash, np.nan, both), np.where(clash, 0, p * q))]
    matches = [np.abs(found - value) <= 1e-6 * (np.abs(a) + np.abs(b)) for _, value, _ in outcomes]
    strangers = ~np.any(matches, axis=0)
    failures = [f"{strangers.sum()} elements are none of the outcomes"] if strangers.any() else []
    sigmas = [(beyond(match.sum(), 0, chance.sum(), (chance * (1 - chance)).sum()), name)
              for match, (name, _, chance) in zip(matches, outcomes)]
    return failures, sigmas


def means_apart(config, inputs, left, right):
    """Sigmas between the means of two results, along the parents' signs: independent masks have equal means."""
    direction = {name: np.sign(sum(widen(inputs[m["model"]][name]) for m in config["models"])) for name in left}
    apart = np.concatenate([((widen(left[n]).astype(np.float64) - widen(right[n])) * direction[n]).ravel() for n in left])
    return abs(apart.sum()) / np.sqrt((apart ** 2).sum()) if apart.any() else np.inf


def check_random(config, inputs, folders):
    """Statistics of both tools' results; a row of the table."""
    check = check_one_parent if len(config["models"]) == 1 else check_two_parents
    results = {tool: read_checkpoint(folder) for tool, folder in folders.items()}
    wrong, sigmas, elements = [], [], 0
    for tool, result in results.items():
        failures, found = check(config, inputs, result)
        wrong += [f"{tool}: {failure}" for failure in failures]
        sigmas += [(sigma, f"{tool} {where}") for sigma, where in found]
        elements = sum(t.size for t in result.values())
    left, right = results.values()
    sigmas.append((means_apart(config, inputs, left, right), "means"))
    sigma, where = max(sigmas)
    if sigma > SIGMAS:
        wrong.append(f"{where} is {sigma:.1f} sigma off")
    return elements, 0, 0, f"{sigma:.1f} sigma", "; ".join(wrong[:3])


# What mergekit 0.1.4 did otherwise: its rows are shown and do not fail.
OTHER_IN_0_1_4 = {
    "linear, normalize gradient": "normalize is one bool",
    "ties, density almost 0": "refuses to keep nothing",
    "ties, density 0": "refuses to keep nothing",
    "breadcrumbs, default gamma": "counts of what stays round otherwise in small tensors",
    "breadcrumbs, normalize": "counts of what stays round otherwise in small tensors",
    "breadcrumbs, rescale": "counts of what stays round otherwise in small tensors",
    "breadcrumbs_ties, normalize": "counts of what stays round otherwise in small tensors",
    "sce 1": "gives every tensor a dimension more",
    "sce, topk 0": "gives every tensor a dimension more",
    "linear, model twice": "merges it",
}


def version_of(environment):
    found = list(pathlib.Path(environment).glob("lib/python*/site-packages/mergekit-*.dist-info"))
    return found[0].name.split("-")[1].removesuffix(".dist") if found else ""


# --- the table -------------------------------------------------------------------------------------------------------

class Table:
    def __init__(self):
        self.failed = False
        print(f"{'case':<38}{'inputs':<10}{'elements':>9}{'differ':>8}{'tied':>6}  {'largest':<12}  result")

    def row(self, name, dtype, elements=0, differing=0, tied=0, largest="", wrong=""):
        self.failed |= bool(wrong)
        verdict = f"DIFFERS  {wrong}" if wrong else "ok"
        print(f"{name:<38}{dtype:<10}{elements:>9}{differing:>8}{tied:>6}  {largest:<12}  {verdict}", flush=True)

    def known(self, name, dtype, reason):
        print(f"{name:<38}{dtype:<10}{'':>25}differs in this mergekit: {reason}", flush=True)

    def failed_in_mergekit(self, name, dtype, error):
        self.failed = True
        print(f"{name:<38}{dtype:<10}{'':>25}FAILED  mergekit: {error}", flush=True)

    def unsupported(self, name, dtype, reason, mine):
        merged = not isinstance(mine, str)
        self.failed |= merged
        verdict = "FAILED  cauldron merges what is listed as unsupported" if merged else f"skipped: {reason}; cauldron: {mine}"
        print(f"{name:<38}{dtype:<10}{'':>25}{verdict}", flush=True)

    def refused(self, name, reason, theirs, mine):
        """mergekit must refuse for the reason that is listed; Cauldron's answer is for the reader."""
        self.failed |= not isinstance(theirs, str)
        verdict = f"skipped: {reason}" if isinstance(theirs, str) else "FAILED  mergekit no longer refuses"
        print(f"{name:<38}{'float32':<10}{'':>25}{verdict}\n{'':<12}mergekit: {first_line(theirs)}\n{'':<12}cauldron: {first_line(mine)}", flush=True)


def first_line(outcome):
    return outcome.splitlines()[0] if isinstance(outcome, str) else "merges it"


def other_side(arguments, dtype, configs, random=False):
    """name -> folder or error of the tool that mergekit is compared with."""
    if not arguments.self_check:
        return {name: ours(config, dtype, arguments.cauldron) for name, config in configs.items()}
    if random:
        return mergekit(arguments.mergekit, dtype, configs, seed=2)
    if dtype == "bfloat16":
        return mergekit(arguments.mergekit, dtype, configs, seed=3, stable=True)
    exact = {name: config | {"dtype": "float64", "out_dtype": dtype} for name, config in configs.items()}
    return mergekit(arguments.mergekit, dtype, exact, seed=3)


def run(arguments, table, dtype, cases, random):
    skipped = {} if dtype == "float32" else {"sce 3"} if arguments.stable else TIES_SPREAD
    configs = {name: in_dtype(config, dtype) for name, config in cases.items() if arguments.only in name and name not in skipped}
    if not configs:
        return
    inputs = {folder.name: read_checkpoint(folder) for folder in sorted((ROOT / dtype).iterdir())}
    theirs = mergekit(arguments.mergekit, dtype, configs, stable=arguments.stable)
    mine = other_side(arguments, dtype, configs, random)
    for name, config in configs.items():
        if name in OTHER_IN_0_1_4 and version_of(arguments.mergekit) == "0.1.4":
            table.known(name, dtype, OTHER_IN_0_1_4[name])
        elif isinstance(theirs[name], str):
            table.failed_in_mergekit(name, dtype, theirs[name])
        elif name in UNSUPPORTED and not arguments.self_check:
            table.unsupported(name, dtype, UNSUPPORTED[name], mine[name])
        elif isinstance(mine[name], str):
            table.row(name, dtype, wrong=f"cauldron: {mine[name]}")
        elif random:
            table.row(name, dtype, *check_random(config, inputs, {"mergekit": theirs[name], "cauldron": mine[name]}))
        else:
            table.row(name, dtype, *compare(config, dtype, inputs, mine[name], theirs[name]))


def run_refused(arguments, table):
    configs = {name: in_dtype(config, "float32") for name, (config, _) in REFUSED.items() if arguments.only in name}
    theirs = mergekit(arguments.mergekit, "float32", configs)
    mine = dict.fromkeys(configs, "not asked") if arguments.self_check else other_side(arguments, "float32", configs)
    for name in configs:
        if name in OTHER_IN_0_1_4 and version_of(arguments.mergekit) == "0.1.4":
            table.known(name, "float32", OTHER_IN_0_1_4[name])
            continue
        table.refused(name, REFUSED[name][1], theirs[name], mine[name])


def main():
    if sys.argv[1:2] == ["--run-mergekit"]:
        return run_mergekit(int(sys.argv[2]), "stable" in sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", default=sys.prefix, metavar="ENVIRONMENT", type=os.path.abspath)
    parser.add_argument("--cauldron", default=CAULDRON, metavar="PROGRAM")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--stable", action="store_true")
    parser.add_argument("--self-check", action="store_true")
    arguments = parser.parse_args()
    shutil.rmtree(ROOT, ignore_errors=True)  # the cache too: a result of an older binary must not be found
    make_checkpoints()
    table = Table()
    for dtype in ("float32", "bfloat16"):
        run(arguments, table, dtype, CASES, random=False)
    run(arguments, table, "float32", RANDOM_CASES, random=True)
    run_refused(arguments, table)
    if not table.failed:  # else they are there to look at
        shutil.rmtree(ROOT / "mergekit")
        shutil.rmtree(DATA, ignore_errors=True)
    sys.exit(table.failed)


if __name__ == "__main__":
    main()
