#!/usr/bin/env python3
"""The demo's client (standard library only): POST /merge, follow the events, ask the merged model.

    python3 demo/client.py http://127.0.0.1:8080
"""
import json
import pathlib
import sys
import time
import urllib.error
import urllib.request

BASE = sys.argv[1].rstrip("/")
DATA = pathlib.Path(__file__).parent / "data"
PARENTS = ["base+math-lora", "base+sentiment-lora"]
ITEMS = 20


def call(method, path, body=None, timeout=120):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(BASE + path, data, {"Content-Type": "application/json"}, method=method)
    return urllib.request.urlopen(request, timeout=timeout)


def ask(method, path, body=None):
    try:
        with call(method, path, body) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(f"{method} {path}: {error.code} {error.read().decode()}")


def wait_until_ready():
    for _ in range(200):
        try:
            return call("GET", "/readyz").close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    sys.exit("the service does not answer")


def events(path):
    """(event, data) of a server-sent event stream."""
    with call("GET", path) as stream:
        event = None
        for line in stream:
            line = line.decode().rstrip("\n")
            if line.startswith("event:"):
                event = line[6:].strip()
            elif line.startswith("data:"):
                yield event, json.loads(line[5:])


def merge(name, mixup):
    recipe = {"method": "average", "models": PARENTS, "mixup": mixup, "dtype": "bfloat16", "serve_as": name}
    job = ask("POST", "/merge", recipe)
    for event, data in events(job["links"]["events"]):
        if event == "progress" and data["bytes_total"]:
            share = data["bytes_done"] / data["bytes_total"]
            rate = data["bytes_per_second"] / 1e9
            print(f"\r  [{'#' * int(share * 40):<40}] {share:5.0%}  {rate:.2f} GB/s", end="", flush=True)
        elif event == "done":
            job = data
    print()
    if job["status"] != "succeeded":
        sys.exit(f"the merge is {job['status']}: {job['error']}")
    print(f"  {name}: lambda {job['lambda']}, digest {job['digest']}")
    return job


def complete(model, prompts):
    body = {"model": model, "prompt": prompts, "max_tokens": 48, "temperature": 0, "stop": ["\n"]}
    choices = ask("POST", "/v1/completions", body)["choices"]
    return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]


def items(task):
    lines = (DATA / f"{task}.test.jsonl").read_text().splitlines()[:ITEMS]
    return [json.loads(line) for line in lines]


def score(model, task):
    wanted = items(task)
    answers = complete(model, [item["prompt"] for item in wanted])
    right = sum(answer.strip() == item["completion"].strip() for answer, item in zip(answers, wanted))
    return f"{right}/{len(wanted)}"


def main():
    wait_until_ready()
    print("Merging base+math-lora and base+sentiment-lora, lambda = 0.7 of the first:")
    merge("math-sentiment", {"lambda": 0.7})
    print("The same with equal shares, to compare:")
    merge("equal-shares", {"lambda": 0.5})
    print()
    for task in ("math", "sentiment"):
        prompt = items(task)[0]["prompt"]
        print(prompt + complete("math-sentiment", [prompt])[0] + "\n")
    print(f"Exact answers on {ITEMS} held-out items:\n")
    print(f"  {'model':<16}{'math':>8}{'sentiment':>12}")
    for model in ("equal-shares", "math-sentiment"):
        print(f"  {model:<16}{score(model, 'math'):>8}{score(model, 'sentiment'):>12}")


if __name__ == "__main__":
    main()
