#!/usr/bin/env python3
"""The formulas of Mixup Model Merge written down a second time, with numpy, and `cauldron merge` against them: average, task
arithmetic and TIES (variant global), each with a given lambda, plain, and on deltas that DARE thinned out.

    reference_m3.py [--cauldron PROGRAM] [--only WORD] [--self-check]

--only        cases whose name contains WORD
--self-check  without Cauldron: the published vectors of TIES, DARE and Philox, and float32 against float64 on every case

Packages: numpy==2.4.6 blake3==1.0.11 PyYAML==6.0.4; scripts/oracle_mergekit.sh installs them. The models are those of
oracle_methods.py. Every case is computed in float32 and in float64 (from float32 deltas, as the merge has them), and the
merge must be within 1e-6 of both.

Sources: M3, arXiv 2502.15434; TIES, arXiv 2306.01708; DARE, arXiv 2311.03099; Philox, Salmon et al., SC 2011.
"""
import argparse
import math
import shutil
import sys

import blake3
import numpy as np

import oracle_methods as tiny

LAMBDAS = (0.0, 0.25, 0.5, 0.8, 1.0)
RETAINS = (0.5, 0.7, 0.9)
SCALINGS = (0.5, 1.0)
# (drop_rate, rescale, seed)
DARES = ((0.2, True, 0), (0.2, "l1", 7), (0.7, False, 2 ** 40 + 1))
TOLERANCE = 1e-6

MASK_CONTEXT = "cauldron drop mask v1"
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_STEPS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)


# --- drop masks ------------------------------------------------------------------------------------------------------

def philox(counter, key):
    """Philox4x32-10 of arrays of counters: four uint64 arrays that hold 32 bits, two ints; four such arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * np.uint64(PHILOX_MULTIPLIERS[0]), c2 * np.uint64(PHILOX_MULTIPLIERS[1])
        high = np.uint64(32)
        c0, c1, c2, c3 = (p1 >> high) ^ c1 ^ np.uint64(k0), p1 & LOW, (p0 >> high) ^ c3 ^ np.uint64(k1), p0 & LOW
        k0, k1 = (k0 + PHILOX_STEPS[0]) & 0xFFFFFFFF, (k1 + PHILOX_STEPS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def mask_key(seed, parent, tensor):
    hasher = blake3.blake3(derive_key_context=MASK_CONTEXT)
    hasher.update(seed.to_bytes(8, "little") + parent.to_bytes(8, "little") + tensor.encode())
    digest = hasher.digest()
    return int.from_bytes(digest[0:4], "little"), int.from_bytes(digest[4:8], "little")


def kept_by_dare(shape, drop_rate, seed, parent, tensor):
    """True where an element survives: its u32 is not below drop_rate * 2^32."""
    size = math.prod(shape)
    block = np.arange((size + 3) // 4, dtype=np.uint64)
    zero = np.zeros_like(block)
    words = philox((block & LOW, block >> np.uint64(32), zero, zero), mask_key(seed, parent, tensor))
    return (np.stack(words, axis=1).ravel()[:size] >= math.ceil(drop_rate * 2 ** 32)).reshape(shape)


def dare(delta, kept, drop_rate, rescale, real):
    """Survivors divided by 1 - drop_rate (the paper), as they are, or brought to the L1 norm of the whole (mergekit)."""
    survivors = np.where(kept, delta.astype(real), real(0))
    if rescale == "l1":
        left = np.abs(survivors).sum(dtype=np.float64)
        return survivors * real(np.abs(delta).sum(dtype=np.float64) / left) if left > 0 else survivors
    return survivors / real(np.float32(1 - drop_rate)) if rescale else survivors


# --- methods on flat vectors -----------------------------------------------------------------------------------------

def weighted_sum(weights, vectors):
    """In the parents' order; a weight of 0 leaves its parent out."""
    total = np.zeros_like(vectors[0])
    for weight, vector in zip(weights, vectors):
        if weight != 0:
            total = total + total.dtype.type(weight) * vector
    return total


def trimmed(delta, retain):
    """The delta with everything below the k-th smallest magnitude at 0; what ties with it stays."""
    k = math.floor(delta.size * (1 - retain))
    if k == 0:
        return delta
    threshold = np.partition(np.abs(delta), k - 1)[k - 1]
    return np.where(np.abs(delta) >= threshold, delta, delta.dtype.type(0))


def elected_signs(deltas):
    """The sign of the sum of the trimmed deltas; where it is 0, that of the majority of all elements."""
    signs = np.sign(weighted_sum([1] * len(deltas), deltas))
    return np.where(signs == 0, np.sign(signs.sum(dtype=np.float64)), signs)


def ties(deltas, retain, weights, mixup):
    """The mean of the kept values; with mixup lambda d1 + (1 - lambda) d2 where both are kept, and a single one in full."""
    deltas = [trimmed(delta, retain) for delta in deltas]
    elected = elected_signs(deltas)
    kept = [(np.sign(delta) == elected) & (delta != 0) for delta in deltas]
    chosen = [np.where(k, delta, delta.dtype.type(0)) for k, delta in zip(kept, deltas)]
    if mixup:
        return np.where(np.logical_and(*kept), weighted_sum(weights, chosen), chosen[0] + chosen[1])
    real = deltas[0].dtype.type
    shares = weighted_sum(weights, [k.astype(real) for k in kept])
    return weighted_sum(weights, chosen) / np.where(shares == 0, real(1), shares)


# --- recipes ---------------------------------------------------------------------------------------------------------

def flat(tensors, names):
    return np.concatenate([tensors[name].ravel() for name in names])


def sparse_delta(recipe, models, index, names, real):
    """One parent's delta over the whole model, in float32 before anything else, thinned out as the recipe says."""
    base, expert = models[recipe["base"]], models[name_of(recipe["models"][index])]
    rule, parts = recipe.get("sparsify"), []
    for name in names:
        delta = expert[name] - base[name]
        if rule is not None:
            kept = kept_by_dare(delta.shape, rule["drop_rate"], rule["seed"], index, name)
            delta = dare(delta, kept, rule["drop_rate"], rule["rescale"], real)
        parts.append(delta.astype(real).ravel())
    return np.concatenate(parts)


def name_of(entry):
    return entry if isinstance(entry, str) else entry["model"]


def weights_of(recipe):
    """lambda and 1 - lambda, or the weights that the recipe names; rounded to float32 once."""
    if "mixup" in recipe:
        ratio = recipe["mixup"]["lambda"]
        return [np.float32(ratio), np.float32(1 - ratio)]
    return [np.float32(1 if isinstance(entry, str) else entry["weight"]) for entry in recipe["models"]]


def reference(recipe, models, real):
    """The merged model as one vector."""
    names, weights, mixup = list(models["base"]), weights_of(recipe), "mixup" in recipe
    parents = range(len(recipe["models"]))
    base = flat(models["base"], names).astype(real)
    if recipe["method"] == "average":
        if "sparsify" in recipe:
            thetas = [base + sparse_delta(recipe, models, i, names, real) for i in parents]
        else:
            thetas = [flat(models[name_of(entry)], names).astype(real) for entry in recipe["models"]]
        total = weighted_sum(weights, thetas)
        return total if mixup else total / real(sum(weights))
    deltas = [sparse_delta(recipe, models, i, names, real) for i in parents]
    if recipe["method"] == "ties":
        merged = ties(deltas, recipe["retain"], weights, mixup)
    else:
        merged = weighted_sum(weights, deltas)
    return base + real(recipe["scaling"]) * merged


def recipe(method, parents, ratio=None, **fields):
    """A recipe; `parents` are names, or (name, weight) without mixup."""
    entries = [parent if isinstance(parent, str) else dict(zip(("model", "weight"), parent)) for parent in parents]
    made = {"method": method, "base": "base", "models": entries, "dtype": "float32"} | fields
    return made | ({"mixup": {"lambda": ratio}} if ratio is not None else {})


def cases():
    """name -> recipe. `mirror` has a's delta with the other sign at most elements: sums of 0, which the majority decides."""
    two, opposed, three = ("a", "b"), ("a", "mirror"), (("a", 0.7), ("b", 0.9), ("c", 0.3))
    made = {"average, plain": recipe("average", two), "average, weights": recipe("average", three)}
    for s in SCALINGS:
        made[f"task_arithmetic, weights, scaling {s}"] = recipe("task_arithmetic", three, scaling=s)
        for rho in RETAINS:
            for label, parents in (("plain", two), ("opposed", opposed), ("weights", three)):
                made[f"ties, {label}, retain {rho}, scaling {s}"] = recipe("ties", parents, scaling=s, retain=rho)
    for x in LAMBDAS:
        made[f"average, lambda {x}"] = recipe("average", two, x)
        for s in SCALINGS:
            made[f"task_arithmetic, lambda {x}, scaling {s}"] = recipe("task_arithmetic", two, x, scaling=s)
            for rho in RETAINS:
                made[f"ties, lambda {x}, retain {rho}, scaling {s}"] = recipe("ties", two, x, scaling=s, retain=rho)
        made[f"ties, opposed, lambda {x}"] = recipe("ties", opposed, x, scaling=1.0, retain=0.9)
        for drop_rate, rescale, seed in DARES:
            rule = {"kind": "dare", "drop_rate": drop_rate, "rescale": rescale, "seed": seed}
            label = f"dare {drop_rate} rescale {rescale}, lambda {x}"
            made[f"average, {label}"] = recipe("average", two, x, sparsify=rule)
            made[f"task_arithmetic, {label}"] = recipe("task_arithmetic", two, x, sparsify=rule, scaling=1.0)
            made[f"ties, {label}"] = recipe("ties", two, x, sparsify=rule, scaling=0.5, retain=0.5)
    return made


# --- self-check ------------------------------------------------------------------------------------------------------

D1 = np.array([0.1, -0.4, 0.3, 0.05, -0.02, 0.5, -0.2, 0])
D2 = np.array([0.2, 0.3, -0.3, 0, 0.6, 0.1, -0.7, 0.04])
KEPT = np.array([1, 0, 1, 1, 0, 1, 0, 1], bool)
RATIO = (0.25, 0.75)


def published_vectors():
    """(name, computed, published)"""
    def zero(vector):
        return [int(word[0]) for word in vector]

    ones = np.full(1, 0xFFFFFFFF, np.uint64)
    none = np.zeros(1, np.uint64)
    yield "average", weighted_sum((0.5, 0.5), (D1, D2)), [.15, -.05, 0, .025, .29, .30, -.45, .02]
    yield "task arithmetic", weighted_sum((1, 1), (D1, D2)), [.30, -.10, 0, .05, .58, .60, -.90, .04]
    yield "mixup", weighted_sum(RATIO, (D1, D2)), [.175, .125, -.15, .0125, .445, .20, -.575, .03]
    yield "ties, retain .5", ties([D1, D2], 0.5, (1, 1), False), [.15, -.40, .30, 0, .60, .50, -.45, 0]
    yield "ties, retain .5, mixup", ties([D1, D2], 0.5, RATIO, True), [.175, -.40, .30, 0, .60, .50, -.575, 0]
    yield "ties, retain .3", ties([D1, D2], 0.3, (1, 1), False), [0, -.40, 0, 0, .60, .50, -.45, 0]
    yield "ties, retain .3, mixup", ties([D1, D2], 0.3, RATIO, True), [0, -.40, 0, 0, .60, .50, -.575, 0]
    yield "dare", dare(D1, KEPT, 0.2, True, np.float64), [.125, 0, .375, .0625, 0, .625, 0, 0]
    yield "dare, l1", dare(D1, KEPT, 0.2, "l1", np.float64), [.165263, 0, .495789, .082632, 0, .826316, 0, 0]
    yield "philox of zeros", zero(philox((none,) * 4, (0, 0))), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    yield "philox of ones", zero(philox((ones,) * 4, (0xFFFFFFFF,) * 2)), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


# --- the table -------------------------------------------------------------------------------------------------------

def row(name, elements, differing, single, double):
    wrong = not (single <= TOLERANCE and double <= TOLERANCE)
    print(f"{name:<52}{elements:>9}{differing:>8}{single:>11.3g}{double:>11.3g}  {'DIFFERS' if wrong else 'ok'}", flush=True)
    return wrong


def check_vectors():
    failed = False
    for name, computed, published in published_vectors():
        apart = np.abs(np.asarray(computed, np.float64) - published)
        failed |= row(f"vector: {name}", apart.size, int((apart > 0).sum()), 0.0, apart.max())
    return failed


def check(name, made, models, program):
    """A row: the merge (without a program the float32 reference itself) against the two references."""
    single, double = reference(made, models, np.float32), reference(made, models, np.float64)
    assert single.dtype == np.float32 and double.dtype == np.float64
    result = single
    if program is not None:
        folder = tiny.ours(made, program=program)
        if isinstance(folder, str):
            print(f"{name:<52}DIFFERS  cauldron: {folder}", flush=True)
            return True
        result = flat(tiny.read_checkpoint(folder), list(models["base"]))
        shutil.rmtree(folder)
    apart = [np.abs(result.astype(np.float64) - wanted) for wanted in (single, double)]
    return row(name, result.size, int((apart[0] > 0).sum()), apart[0].max(), apart[1].max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cauldron", default=tiny.CAULDRON, metavar="PROGRAM")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--self-check", action="store_true")
    arguments = parser.parse_args()
    shutil.rmtree(tiny.DATA, ignore_errors=True)  # a result of an older binary must not be found
    tiny.make_checkpoints()
    models = {name: tiny.read_checkpoint(tiny.ROOT / "float32" / name) for name in ("base", "a", "b", "c", "mirror")}
    print(f"{'case':<52}{'elements':>9}{'differ':>8}{'float32':>11}{'float64':>11}  result")
    failed = check_vectors() if arguments.self_check else False
    for name, made in cases().items():
        if arguments.only in name:
            failed |= check(name, made, models, None if arguments.self_check else arguments.cauldron)
    sys.exit(failed)


if __name__ == "__main__":
    main()
