#!/usr/bin/env python3
"""The real lm-eval against the service (local-completions: one and sixteen requests at a time, the folder's own tokenizer
and the service's) and lm-eval's own hf backend on the same folders: log-likelihoods, rolling ones and generate_until; equal
metrics, log-likelihoods within 1e-3, equal generations.

    oracle_lmeval.py URL [LIMIT]

Needs the packages of requirements-oracles.txt; scripts/oracles.sh installs them and runs this.
"""
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", str(pathlib.Path("target/oracle/datasets").absolute()))
os.environ.setdefault("OPENAI_API_KEY", "unused")

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from service import MODELS, Service  # noqa: E402

TASKS = ["cauldron_sentiment", "cauldron_math", "cauldron_rolling"]
TOLERANCE = 1e-3
RECIPE = {"method": "average", "models": ["math", "sentiment"], "mixup": {"lambda": 0.7}, "dtype": "bfloat16"}


def evaluate(model, arguments, batch, limit):
    manager = TaskManager(include_path=str(pathlib.Path(__file__).parent / "lmeval_tasks"), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=TASKS, batch_size=batch, limit=limit,
                                   task_manager=manager, log_samples=True, bootstrap_iters=0)


def differences(ours, theirs):
    """Largest difference of log-likelihoods, and how many greedy flags and generations differ, by task."""
    table = {}
    for task in TASKS:
        worst, other, count = 0.0, 0, 0
        pairs = zip(sorted(ours["samples"][task], key=lambda s: s["doc_id"]),
                    sorted(theirs["samples"][task], key=lambda s: s["doc_id"]), strict=True)
        for a, b in pairs:
            for x, y in zip(a["resps"], b["resps"], strict=True):
                x, y = x[0], y[0]
                count += 1
                if isinstance(x, str):
                    other += x != y
                elif isinstance(x, (list, tuple)):
                    worst = max(worst, abs(x[0] - y[0]))
                    other += bool(x[1]) != bool(y[1])
                else:
                    worst = max(worst, abs(x - y))
        table[task] = (count, worst, other)
    return table


def main():
    service = Service(sys.argv[1])
    limit = int(sys.argv[2]) if len(sys.argv) > 2 else None
    merged, _ = service.merge(RECIPE)
    service.load("base", "base")
    service.load("math-sentiment", f"checkpoint:{merged.name}")
    rows, failed, hf = [], False, {}
    for name, folder, concurrent, tokenizer in [
        ("base", MODELS / "base", 1, "huggingface"),
        ("base", MODELS / "base", 16, "remote"),
        ("math-sentiment", merged, 16, "remote"),
    ]:
        own = {"tokenizer": str(folder)} if tokenizer == "huggingface" else {}
        ours = evaluate("local-completions", {
            "model": name, "base_url": f"{service.url}/m/{name}/v1/completions", "tokenized_requests": True,
            "tokenizer_backend": tokenizer, "num_concurrent": concurrent, "max_length": 2048, "timeout": 300,
        } | own, 4, limit)
        if name not in hf:
            hf[name] = evaluate("hf", {
                "pretrained": str(folder), "dtype": "float32", "device": "cpu", "max_length": 2048,
            }, 16, limit)
        theirs = hf[name]
        for task, (count, worst, other) in differences(ours, theirs).items():
            metric = next(k for k in ours["results"][task]
                          if "," in k and "stderr" not in k and ours["results"][task][k] != "N/A")
            a, b = ours["results"][task][metric], theirs["results"][task][metric]
            # What log-likelihoods may differ by, over the bytes of a short text.
            same = abs(a - b) < (5e-5 if "bits" in metric else 1e-12)
            good = same and worst < TOLERANCE and other == 0
            failed |= not good
            rows.append((f"{name}, {concurrent} {tokenizer[:6]}", task, metric.split(",")[0], count, a, b, worst, other, "ok" if good else "DIFFERS"))
    print(f"\n{'model':<28}{'task':<20}{'metric':<14}{'requests':>9}{'ours':>10}{'hf':>10}"
          f"{'max |dloglik|':>15}{'other':>7}")
    for name, task, metric, count, a, b, worst, other, verdict in rows:
        print(f"{name:<28}{task:<20}{metric:<14}{count:>9}{a:>10.4f}{b:>10.4f}{worst:>15.2e}{other:>7}  {verdict}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
