#!/usr/bin/env python3
"""Recipes over random checkpoints `base`, `a`, `b`, `c` for scripts/gpu_check.sh: gpu_recipes.py FOLDER writes one file each;
the names of those that are timed are printed."""
import json
import pathlib
import sys

TWO, THREE = ["a", "b"], ["a", "b", "c"]
MIX, SHARES = {"lambda": 0.35}, {"shares": [0.2, 0.3, 0.5]}
DARE = {"kind": "dare", "drop_rate": 0.2, "seed": 3}


def recipe(method, models=TWO, base="base", **more):
    return {"method": method, "models": models} | ({"base": base} if base else {}) | more


def weighted(*weights):
    return [{"model": name, "weight": weight} for name, weight in zip(THREE, weights)]


RECIPES = {
    "average": recipe("average", base=None),
    "average-mixed": recipe("average", base=None, mixup=MIX),
    "average-weights": recipe("average", weighted(1.0, 0.0, 2.5), base=None),
    "average-shares": recipe("average", THREE, base=None, mixup=SHARES),
    "average-dare": recipe("average", sparsify=DARE),
    "task": recipe("task_arithmetic", scaling=0.7),
    "task-mixed": recipe("task_arithmetic", mixup=MIX),
    "task-three": recipe("task_arithmetic", weighted(0.5, -0.25, 1.5), normalize=True),
    "task-exclude": recipe("task_arithmetic", mixup=MIX, exclude=["norm", "embed"]),
    "task-layers": recipe("task_arithmetic", mixup={"lambda": [0.0, 0.3, 1.0]}, scaling=[{"filter": "mlp", "value": 0.5}, {"value": 1.0}]),
    "ties": recipe("ties", retain=0.6),
    "ties-mixed": recipe("ties", retain=0.6, mixup=MIX),
    "ties-three": recipe("ties", THREE, retain=0.3, mixup=SHARES),
    "ties-tensor": recipe("ties", weighted(0.5, 1.5), retain=0.4, variant="tensor", normalize=True),
    "ties-tensor-sum": recipe("ties", weighted(0.5, 1.5, 0.7), retain=0.4, variant="tensor", normalize=False),
    "dare-task": recipe("task_arithmetic", sparsify=DARE, mixup=MIX),
    "dare-ties": recipe("ties", retain=0.5, sparsify=DARE, mixup=MIX),
    "dare-l1": recipe("task_arithmetic", sparsify=DARE | {"rescale": "l1"}),
    "della": recipe("task_arithmetic", sparsify={"kind": "della", "retain": 0.6, "epsilon": 0.2, "rescale": False}, mixup=MIX),
    "della-l1": recipe("ties", retain=0.5, sparsify={"kind": "della", "retain": 0.6, "epsilon": 0.2, "rescale": "l1"}, mixup=MIX),
    "magnitude": recipe("task_arithmetic", sparsify={"kind": "magnitude", "retain": 0.4}),
    "breadcrumbs": recipe("ties", retain=1.0, variant="tensor", sparsify={"kind": "breadcrumbs", "retain": 0.7, "gamma": 0.05}),
    "slerp": recipe("slerp", base=None, t=0.3),
    "nuslerp": recipe("nuslerp", weighted(0.3, 0.7)),
    "multislerp": recipe("multislerp", THREE, base=None),
    "karcher": recipe("karcher", THREE, base=None),
    "model-stock": recipe("model_stock", THREE),
    "half": recipe("task_arithmetic", mixup=MIX, dtype="float16"),
    "single": recipe("ties", retain=0.6, mixup=MIX, dtype="float32"),
}
TIMED = ["average-mixed", "task-mixed", "ties-mixed", "dare-task", "dare-ties", "ties-three"]


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in RECIPES.items():
        (folder / f"{name}.json").write_text(json.dumps({"dtype": "bfloat16"} | value))
    print(*TIMED)


if __name__ == "__main__":
    main()
