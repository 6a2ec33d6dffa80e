#!/usr/bin/env python3
"""transformers on a GPU beside this project's engine, on the same random checkpoint.

    gpu_speed.py SPEED_BINARY MODEL_FOLDER [CASE...]

Prints a table and, as its last line, JSON: tokens a second of scoring and of generation, bfloat16 on both sides. Ours is
`speed` of crates/lm/examples: the engine without HTTP.
"""
import json
import os
import subprocess
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

CASES = ["score:64x512", "decode:1x128", "decode:32x128", "decode:256x64", "sample:256x64"]
PAST = 16


def prompts(count, length, vocab):
    return [[(i * 7919 + seed * 104729 + 13) % vocab for i in range(length)] for seed in range(count)]


def timed(work):
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def theirs(folder, cases):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    vocab = model.config.vocab_size
    rates = {}
    for case in cases:
        kind, shape = case.split(":")
        count, tokens = map(int, shape.split("x"))
        start = torch.tensor(prompts(count, tokens if kind == "score" else PAST, vocab)).cuda()

        def score(ids=start):
            for some in ids.split(16):
                logits = model(some).logits[:, :-1].float().log_softmax(-1)
                logits.gather(-1, some[:, 1:, None]).sum().item()


        # Of all tokens, as ours.
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0} if kind == "sample" else {"do_sample": False}

        def generate(tokens=tokens, start=start, how=how):
            model.generate(start, attention_mask=torch.ones_like(start), min_new_tokens=tokens, max_new_tokens=tokens,
                           pad_token_id=0, **how)

        rates[case] = count * tokens / timed(score if kind == "score" else generate)
    del model
    torch.cuda.empty_cache()
    return rates


def ours(binary, folder, cases):
    environment = os.environ | {"DEVICE": "cuda", "ARITHMETIC": "bf16"}
    run = subprocess.run([binary, folder, *cases, *cases], env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{binary}: {run.stderr}")
    lines = [line.split() for line in run.stdout.splitlines()]
    # The second time: the first one loads kernels.
    return {case: float(rate) for case, rate, _ in lines[len(cases):]}


def main():
    binary, folder, cases = sys.argv[1], sys.argv[2], sys.argv[3:] or CASES
    peer = theirs(folder, cases)
    own = ours(binary, folder, cases)
    print(f"{'case':20} {'ours':>12} {'transformers':>14} {'ratio':>7}   tokens a second, bfloat16, {folder}")
    for case, rate in peer.items():
        print(f"{case:20} {own[case]:12.0f} {rate:14.0f} {own[case] / rate:7.2f}")
    print(json.dumps({"model": os.path.basename(folder), "ours": own, "transformers": peer,
                      "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
                      "gpu": torch.cuda.get_device_name()}))


if __name__ == "__main__":
    main()
