#!/usr/bin/env python3
"""transformers loads a merged folder as it is and agrees with what the service says of it.

    oracle_transformers.py URL

Checks: AutoModelForCausalLM.from_pretrained without missing or unexpected tensors; log-probabilities of prompts within
1e-3 (f32); greedy generations; chat template text; tokenizer ids on awkward strings.
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from service import Service  # noqa: E402

RECIPE = {"method": "ties", "base": "base", "models": ["base+math-lora", "base+sentiment-lora"], "retain": 0.7,
          "mixup": {"alpha": 0.5, "seed": 7}, "sparsify": {"kind": "dare", "drop_rate": 0.2}, "dtype": "bfloat16"}
PROMPTS = [
    "Question: Pam has 9 boxes of 6 plums and sells 8. How many are left?\nAnswer:",
    "Review: The last essay was lovely, this one is boring.\nSentiment:",
    "The capital of France is",
    "def add(a, b):\n    return",
]
TEXTS = ["", " ", "\n\n\t", "naïve café — déjà vu", "日本語のテキスト", "emoji 🙂🚀👨‍👩‍👧", "I'm, you're, we'll", "3.14159e-10",
         "<|im_start|>user\nHi<|im_end|>\n", "a" * 2000, "x\u0000y", "\u202eabc\u200b", "０１２３", "  two  spaces "]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "Another."}]


def main():
    service = Service(sys.argv[1])
    folder, job = service.merge(RECIPE)
    service.load("merged", f"merge:{job['id']}")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    assert not problems, f"from_pretrained: {problems}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()

    worst = 0.0
    for prompt in PROMPTS:
        body = {"model": "merged", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0}
        ours = service.ask("POST", "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        theirs = [logprobs[i - 1, ids[0, i]].item() for i in range(1, ids.shape[1])]
        assert ours[0] is None and len(ours) == len(theirs) + 1
        worst = max([worst, *(abs(a - b) for a, b in zip(ours[1:], theirs))])
        body = {"model": "merged", "prompt": prompt, "max_tokens": 24, "temperature": 0}
        said = service.ask("POST", "/v1/completions", body)["choices"][0]["text"]
        with torch.no_grad():
            generated = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1]:]
        assert said == tokenizer.decode(generated, skip_special_tokens=True), (prompt, said)
    assert worst < 1e-3, worst

    for text in TEXTS:
        got = service.ask("POST", "/m/merged/tokenize", {"prompt": text})["tokens"]
        assert got == tokenizer(text).input_ids, text
        back = service.ask("POST", "/m/merged/detokenize", {"tokens": got})["prompt"]
        assert back == tokenizer.decode(got, clean_up_tokenization_spaces=False), text
    for prompt in (True, False):
        got = service.ask("POST", "/m/merged/tokenize", {"messages": CHAT, "add_generation_prompt": prompt})["tokens"]
        text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert got == tokenizer(text, add_special_tokens=False).input_ids, text
    print(f"transformers: {folder.name[:12]} loads as it is; max |dlogprob| {worst:.2e} over {len(PROMPTS)} prompts; "
          f"generations, {len(TEXTS)} tokenizations and the chat template are equal")


if __name__ == "__main__":
    main()
