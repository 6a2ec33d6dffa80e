#!/usr/bin/env python3
"""The service on a GPU, over HTTP: gpu_service.py CAULDRON MODELS [DEVICE]. MODELS has the checkpoints base, a and b (of
bench/random_llama.py); DEVICE is that of --device (cuda:0; on the CPU this shows that the script works).

Points of families that are made in the GPU's memory must have the weights of the merges on disk: the same digest, and the same
scores as those files when they are loaded. Then more models than the GPU has memory for. Prints a table and a line of JSON.
The standard library; torch to fill the GPU."""
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

from service import Service

MIX = {"lambda": 0.5}
DARE = {"kind": "dare", "drop_rate": 0.2, "seed": 3}
DELLA = {"kind": "della", "retain": 0.6, "epsilon": 0.2, "rescale": False}


def recipe(method, **more):
    return {"method": method, "models": ["a", "b"], "dtype": "bfloat16"} | more


FAMILIES = {
    "average": recipe("average"),
    "task": recipe("task_arithmetic", base="base"),
    "ties": recipe("ties", base="base", retain=0.6),
    "dare": recipe("task_arithmetic", base="base", sparsify=DARE),
    "della": recipe("task_arithmetic", base="base", sparsify=DELLA),
    "slerp": recipe("slerp"),
}
PROMPT = "The capital of France is Paris, and that of Italy is Rome."


def tokenizer():
    """Of bytes, and one token that ends."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = iter(range(256, 512))
    vocab = {chr(b) if b in printable else chr(next(others)): b for b in range(256)}
    level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    end = {"id": 256, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
           "special": True}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
            "added_tokens": [end], "pre_tokenizer": level | {"add_prefix_space": False},
            "decoder": level | {"add_prefix_space": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "vocab": vocab | {"<|end|>": 256}, "merges": []}}


class Started(Service):
    """The service as a process of its own, as long as the block lasts."""

    def __init__(self, program, models, data, *more):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        listen = ["--listen", f"127.0.0.1:{port}", "--data-dir", data, "--models-dir", models, "--log", "warn"]
        self.process = subprocess.Popen([program, "serve", *listen, *more])
        super().__init__(f"http://127.0.0.1:{port}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def text(self, path):
        with urllib.request.urlopen(self.url + path) as answer:
            return answer.read().decode()

    def scores(self, model):
        body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        return self.ask("POST", "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][1:-1]

    def saved(self, name, lam):
        """A point, and the digest of its merge on disk."""
        made = self.ask("POST", f"/models/{name}/point", {"lambda": lam, "save": True})
        job = {"id": made["merge"]["id"], "status": "queued"}
        while job["status"] in ("queued", "running"):
            time.sleep(0.05)
            job = self.ask("GET", f"/merge/{job['id']}")
        if job["status"] != "succeeded":
            raise SystemExit(f"{name}: {job}")
        return made, job["digest"]


def families(service, device):
    """A line for each family; whether all is as it must be."""
    rows, right = [], True
    print("| family | on | prepared | held | pass | first point | same digest | same scores |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- | --- |")
    for name, of in FAMILIES.items():
        slot = service.load(name, of)
        digests, scores = [], []
        for lam in (0.25, 0.6):
            made, digest = service.saved(name, lam)
            digests.append(made["system_fingerprint"] == digest)
            service.load("loaded", f"checkpoint:{digest}")
            scores.append(service.scores(made["model"]) == service.scores("loaded"))
        point = made["point"]
        there = device == "cpu" or slot["device"] == device and slot["family"]["held_bytes"] > 0
        right &= all(digests) and all(scores) and there
        rows.append({"family": name, "device": slot["device"], "held_bytes": slot["family"]["held_bytes"],
                     "prepared_seconds": slot["ready_seconds"], "digests": digests, "scores": scores} | point)
        print(f"| {name} | {slot['device']} | {slot['ready_seconds']:.2f} s | {slot['family']['held_bytes'] / 1e6:.0f} MB "
              f"| {point['pass_seconds'] * 1e3:.1f} ms | {point['seconds'] * 1e3:.1f} ms | {all(digests)} | {all(scores)} |")
    return rows, right


def out_of_memory(program, models, data, device):
    """Three models of which a GPU's memory has room for two: the one not asked for longest goes. None where there is no GPU.
    Most of the memory is somebody else's meanwhile."""
    if device == "cpu":
        return None
    index = device.split(":")[1]
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", f"--id={index}"]
    free = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20
    left, keys_and_values = 16 << 30, 6 << 30
    ballast = f"import torch, sys; x = torch.empty({free - left}, dtype=torch.uint8, device='cuda:{index}'); print('there', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", ballast], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    try:
        return crowd(program, models, data, device, 16 * free, keys_and_values)
    finally:
        holder.communicate()


def crowd(program, models, data, device, told, keys_and_values):
    # The service is told of more memory than there is: only the GPU says when it is full.
    more = ["--device", device, "--model-memory-bytes", str(told), "--kv-cache-bytes", str(keys_and_values)]
    with Started(program, models, data, *more) as service:
        before = service.load("base", "base") and service.scores("base")
        service.load("a", "a")
        third = service.load("b", "b")["status"]
        others = [service.ask("GET", f"/models/{name}")["status"] for name in ("base", "a")]
        again = service.scores("base")
        relieved = [line for line in service.text("/metrics").splitlines() if line.startswith("cauldron_device_relieved")]
    return {"third": third, "others": others, "came_back": before == again, "relieved": relieved}


def main():
    program, models = sys.argv[1], pathlib.Path(sys.argv[2])
    device = sys.argv[3] if len(sys.argv) > 3 else "cuda:0"
    for name in ("base", "a", "b"):
        (models / name / "tokenizer.json").write_text(json.dumps(tokenizer()))
        (models / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    with tempfile.TemporaryDirectory(dir=models) as data:
        with Started(program, models, f"{data}/one", "--device", device, "--deterministic") as service:
            rows, right = families(service, device)
        crowded = out_of_memory(program, models, f"{data}/two", device)
    if crowded:
        right &= crowded["third"] == "ready" and "unloaded" in crowded["others"] and crowded["came_back"]
    print(json.dumps({"families": rows, "out_of_memory": crowded, "right": right}))
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
