#!/usr/bin/env python3
"""transformers as a peer of bench/serve.py: peer_transformers.py FOLDER float32|bfloat16 THREADS reads one JSON task a line
and answers each with one."""
import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM


class Model:
    def __init__(self, folder, dtype, threads):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def score(self, prompts, batch):
        """The log-probability of every token, as lm-eval's hf backend takes it: the whole log_softmax in f32."""
        start = time.perf_counter()
        sums = []
        for i in range(0, len(prompts), batch):
            ids = torch.tensor(prompts[i:i + batch])
            logits = self.model(ids).logits[:, :-1].float().log_softmax(-1)
            sums += logits.gather(-1, ids[:, 1:, None]).sum((1, 2)).tolist()
        return {"seconds": time.perf_counter() - start, "sums": sums}

    @torch.inference_mode()
    def generate(self, prompts, tokens, copies=1):
        ids = torch.tensor(prompts)
        options = {"do_sample": True, "temperature": 0.8, "num_return_sequences": copies} if copies > 1 else {}
        start = time.perf_counter()
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens, max_new_tokens=tokens,
                                  pad_token_id=0, **({"do_sample": False} | options))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": out[:, ids.shape[1]:].tolist()}


def main():
    model = Model(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    print(json.dumps({"ready": True, "version": f"{transformers.__version__}, torch {torch.__version__}"}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(getattr(model, task.pop("do"))(**task)), flush=True)


if __name__ == "__main__":
    main()
