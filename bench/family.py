"""The driver of bench/family.sh: asks for one lambda after the other, and copies memory between them."""
import argparse
import http.client
import json
import statistics
import subprocess
import time

from merge import ROOT, machine, output_of, results_path
from serve import MODEL, THREADS, WORK, Service

EXPERTS = ["math", "sentiment"]
RECIPES = {
    "average": {"method": "average", "models": EXPERTS},
    "task_arithmetic": {"method": "task_arithmetic", "base": "base", "models": EXPERTS},
    "ties": {"method": "ties", "base": "base", "models": EXPERTS},
    "dare": {"method": "task_arithmetic", "base": "base", "models": EXPERTS,
             "sparsify": {"kind": "dare", "drop_rate": 0.2, "seed": 1}},
    "della": {"method": "task_arithmetic", "base": "base", "models": EXPERTS,
              "sparsify": {"kind": "della", "drop_rate": 0.4, "epsilon": 0.2}},
    "slerp": {"method": "slerp", "base": "base", "models": EXPERTS},
    "adapters": {"method": "task_arithmetic", "base": "base", "models": ["base+math-lora", "base+sentiment-lora"]},
}
# Of the bandwidth of a copy, and seconds.
PASS_BAR, FIRST_TOKEN_BAR = 0.6, 0.5


def first_token(service, model):
    """Seconds until the first piece of a stream."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 2, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=120)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{model}: {response.status} {response.read().decode()}")
    while not response.readline().startswith(b"data:"):
        pass
    seconds = time.perf_counter() - start
    response.read()
    connection.close()
    return seconds


def copy():
    """Bytes read and written a second by a copy of as much memory as a point has."""
    told = subprocess.run([WORK / "limits", "copy", "256", str(THREADS), "5"], capture_output=True, text=True, check=True)
    return json.loads(told.stdout)["bytes_per_second"]["memcpy"]["median"]


def main():
    parser = argparse.ArgumentParser(description="The driver of bench/family.sh.")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    started, found, samples = time.time(), {}, []
    service = Service("--max-points", "6", names=())
    for name, recipe in RECIPES.items():
        service.ask("POST", "/models", {"name": name, "source": recipe})
        while (slot := service.ask("GET", f"/models/{name}"))["status"] == "loading":
            time.sleep(0.05)
        found[name] = {"prepared_seconds": slot["ready_seconds"], "input_bytes": slot["family"]["input_bytes"],
                       "held_bytes": slot["family"]["held_bytes"]}
    for number in range(args.rounds):
        bandwidth = copy()
        for name in RECIPES:
            model = f"{name}@{(number + 1) / (args.rounds + 2):.4g}"
            cold = first_token(service, model)
            warm = first_token(service, model)
            points = service.ask("GET", f"/models/{name}")["family"]["points"]
            point = next(p["point"] for p in points if p["name"] == model)
            samples.append({"method": name, "model": model, "first_token_seconds": cold, "warm_seconds": warm,
                            "copy_bytes_per_second": bandwidth} | point)
    service.close()
    here = machine(WORK)
    result = {"benchmark": "family", "date": time.strftime("%Y-%m-%d"), "seconds": time.time() - started,
              "commit": output_of("git", "rev-parse", "HEAD"), "machine": here, "model": str(MODEL.relative_to(ROOT)),
              "families": found, "samples": samples}
    path = results_path(ROOT / "bench/results", here["cpu"], result["date"], "family")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("| method | first token after a switch | of it the weights | the pass | of a copy's bandwidth | prepared once in |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in RECIPES:
        own = [sample for sample in samples if sample["method"] == name]
        middle = lambda field: statistics.median(sample[field] for sample in own)
        share = statistics.median(sample["bytes_per_second"] / sample["copy_bytes_per_second"] for sample in own)
        # What adapters make of the base, and what DELLA leaves, is read too and is not among the bytes of checkpoints.
        comparable = name not in ("adapters", "della")
        mark = lambda kept: "" if kept else " (!)"
        print(f"| {name} | {middle('first_token_seconds'):.3f} s{mark(middle('first_token_seconds') <= FIRST_TOKEN_BAR)} "
              f"| {middle('seconds'):.3f} s | {middle('pass_seconds') * 1000:.0f} ms "
              f"| {f'{share:.0%}{mark(share >= PASS_BAR)}' if comparable else '-'} | {found[name]['prepared_seconds']:.2f} s |")
    print(f"\nBars: first token {FIRST_TOKEN_BAR} s, pass {PASS_BAR:.0%}; (!) misses. {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
