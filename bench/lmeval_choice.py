#!/usr/bin/env python3
"""The multiple-choice part of bench/serve.py: lm-eval's own loop over one task of four choices, with the model loaded before
the clock starts.

    lmeval_choice.py TASKS_FOLDER TASK hf FOLDER float32 BATCH
    lmeval_choice.py TASKS_FOLDER TASK served URL MODEL CONCURRENT

Answers with one line of JSON: seconds, requests, accuracy.
"""
import json
import logging
import os
import sys
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "unused",
               "HF_DATASETS_CACHE": os.path.abspath("target/bench/datasets")}

import lm_eval  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


def main():
    tasks, task, kind, *rest = sys.argv[1:]
    logging.disable(logging.WARNING)
    if kind == "hf":
        folder, dtype, batch = rest
        model = get_model("hf")(pretrained=folder, dtype=dtype, device="cpu", batch_size=int(batch), max_length=2048)
    else:
        url, name, concurrent = rest
        model = get_model("local-completions")(
            model=name, base_url=f"{url}/m/{name}/v1/completions", tokenized_requests=True, tokenizer_backend="remote",
            num_concurrent=int(concurrent), batch_size=16, max_length=2048, timeout=300)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    start = time.perf_counter()
    out = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True)
    seconds = time.perf_counter() - start
    requests = sum(len(sample["resps"]) for sample in out["samples"][task])
    print(json.dumps({"seconds": seconds, "requests": requests, "accuracy": out["results"][task]["acc,none"]}))


if __name__ == "__main__":
    main()
