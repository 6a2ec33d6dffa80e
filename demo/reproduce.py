"""The design of Table 2 of Mixup Model Merge (arXiv 2502.15434) at small scale; see demo/reproduce.sh."""
import argparse
import decimal
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ROOT / "target/demo/models"
EXPERTS = ["math", "code", "sentiment"]
TOKENS = {"math": 40, "code": 24, "sentiment": 6}
METHODS = {
    "average": {"method": "average"},
    "task arithmetic": {"method": "task_arithmetic", "base": "base"},
    "TIES": {"method": "ties", "base": "base"},
    "DARE": {"method": "task_arithmetic", "base": "base", "sparsify": {"kind": "dare", "drop_rate": 0.2, "seed": 0}},
}


class Service:
    def __init__(self, binary, data):
        self.process = subprocess.Popen(
            [binary, "serve", "--listen", "127.0.0.1:0", "--data-dir", data, "--models-dir", MODELS, "--tasks-dir",
             ROOT / "demo/data", "--log-format", "json", "--log", "info"], stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if address := json.loads(line).get("fields", {}).get("address"):
                self.url = f"http://{address}"
                break
        # Read on, so that the pipe is never full.
        import threading
        threading.Thread(target=lambda: [None for _ in self.process.stderr], daemon=True).start()

    def ask(self, method, path, body=None, text=False):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=600) as response:
            answer = response.read().decode()
            return answer if text or not answer else json.loads(answer)


def sweep(service, pair, method, limit, seed):
    recipe = METHODS[method] | {"models": list(pair)}
    tasks = [{"name": task, "file": f"{task}.test.jsonl", "max_tokens": TOKENS[task], "stop": "\n"} |
             ({"limit": limit} if limit else {}) for task in pair]
    made = service.ask("POST", "/sweeps", {"recipe": recipe, "tasks": tasks, "search": "m3", "seed": seed,
                                           "split": {"seed": seed, "dev": 0.5}})
    start, shown = time.time(), -1
    while made["status"] in ("queued", "running"):
        time.sleep(1)
        made = service.ask("GET", f"/sweeps/{made['id']}")
        if len(made["trials"]) != shown:
            shown = len(made["trials"])
            print(f"\r{'+'.join(pair)}, {method}: {shown} of {made['total']} trials, {time.time() - start:.0f} s",
                  end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if made["status"] != "done":
        raise SystemExit(f"{pair} {method}: {made['status']} {made.get('error')}")
    return made


# What of a prompt an attack may change, by task.
WITHIN = {"sentiment": "Review: (.*)"}
ATTACKS = {"DeepWordBug": {"kind": "deep_word_bug", "rate": 0.3}, "StressTest": {"kind": "stress_test"},
           "synonyms": {"kind": "synonyms", "rate": 1.0}}


def robustness(service, pair, method, made, limit):
    """Drop rates of the plain method and of the best draw, by attack and task."""
    tasks = [{"name": task, "file": f"{task}.test.jsonl", "max_tokens": TOKENS[task], "stop": "\n", "attack_within": WITHIN[task]} |
             ({"limit": limit} if limit else {}) for task in pair if task in WITHIN]
    drawn = [t for t in made["trials"] if isinstance(t["origin"], dict) and t["score"] is not None]
    best = max(drawn, key=lambda t: t["score"])
    service.ask("POST", "/models", {"name": "under-attack", "source": METHODS[method] | {"models": list(pair)}})
    found = []
    for label, point in [("plain", "plain"), ("M3", format(decimal.Decimal(repr(best["shares"][0])), "f"))]:
        for attack, how in ATTACKS.items():
            asked = service.ask("POST", "/evals", {"model": f"under-attack@{point}", "tasks": tasks, "attack": how})
            while asked["status"] == "running":
                time.sleep(0.5)
                asked = service.ask("GET", f"/evals/{asked['id']}")
            if asked["status"] != "done":
                raise SystemExit(f"{pair} {method} {attack}: {asked['error']}")
            for task in asked["tasks"]:
                found.append({"pair": "+".join(pair), "method": method, "model": label, "attack": attack, "task": task["name"],
                              "plain": task["scores"]["all"]["exact"], "attacked": task["attacked"]["scores"]["all"]["exact"],
                              "drop": task["attacked"]["drop_rate"]["all"].get("exact")})
    service.ask("DELETE", "/models/under-attack")
    return found


def shown(metric):
    return f"{100 * metric['value']:.1f} ± {100 * (metric['stderr'] or 0):.1f}"


def mean_of(metrics):
    value = sum(m["value"] for m in metrics) / len(metrics)
    error = sum((m["stderr"] or 0) ** 2 for m in metrics) ** 0.5 / len(metrics)
    return {"value": value, "stderr": error}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", default=",".join("+".join(p) for p in itertools.combinations(EXPERTS, 2)))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--limit", type=int, help="items a task (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs/REPRODUCTION.md")
    args = parser.parse_args()
    out = args.out
    with tempfile.TemporaryDirectory(dir=ROOT / "target/demo") as data:
        service = Service(os.environ.get("CAULDRON", ROOT / "target/release/cauldron"), data)
        try:
            found, attacked = {}, []
            for pair in [tuple(p.split("+")) for p in args.pairs.split(",")]:
                for method in args.methods.split(","):
                    found[pair, method] = made = sweep(service, pair, method, args.limit, args.seed)
                    path = out.parent / "reproduction" / f"{'-'.join(pair)}-{method.replace(' ', '-').lower()}.svg"
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(service.ask("GET", f"/sweeps/{made['id']}/plot.svg", text=True))
                    if any(task in WITHIN for task in pair):
                        attacked += robustness(service, pair, method, made, args.limit)
                    # What is there counts if the rest is not waited for.
                    write(out, found, attacked, args)
        finally:
            service.process.terminate()
            service.process.wait()
    print(out)


def write(out, found, attacked, args):
    any_sweep = next(iter(found.values()))
    items = any_sweep["trials"][0]["dev"][0]["items"], any_sweep["trials"][0]["test"][0]["items"]
    lines = [
        "# Mixup Model Merge at small scale", "",
        "The design of Table 2 of the paper (arXiv 2502.15434): pairs of experts of one base x merging methods x {plain, M3}. "
        "Experts: LoRA fine-tunes of SmolLM2-135M-Instruct (demo/adapters), folded; tasks: exact match on demo/data, greedy. "
        "M3 draws one lambda for each alpha of 0.2, 0.4, 0.5, 1, 2, 3, 5 and takes the best by the mean of both tasks on "
        f"{items[0]} dev items a task; numbers are of the other {items[1]} items, in per cent, ± one standard error. "
        f"Seed {args.seed}. Made by `demo/reproduce.sh"
        + (f" --limit {args.limit}" if args.limit else "") + (f" --pairs {args.pairs}" if args.pairs.count(",") < 2 else "")
        + "`; each sweep's recipe, seeds and scores follow from its line.", "",
        "| pair | method | plain, mean | M3, mean | first task, plain / M3 | second task, plain / M3 | lambda | alpha, seed | M3 over plain | best fixed ratio of 0, 0.5, 1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    gains, edges, better = [], 0, 0
    for (pair, method), made in found.items():
        trials = made["trials"]
        # Of an average equal shares are the plain method.
        plain = next((t for t in trials if t["origin"] == "plain"), None) or next(t for t in trials if t["shares"] == [0.5])
        drawn = [t for t in trials if isinstance(t["origin"], dict) and t["score"] is not None]
        winner = max(drawn, key=lambda t: t["score"])
        if not winner.get("test"):
            # The verdict's winner was a baseline: only dev scores are there for the best draw.
            winner_test = None
        else:
            winner_test = winner["test"]
        fixed = max((t for t in trials if t["origin"] == "baseline" and t["score"] is not None), key=lambda t: t["score"])
        plain_mean = mean_of(plain["test"])
        draw = winner["origin"]["draw"]
        cells = [f"{pair[0]} + {pair[1]}", method, shown(plain_mean)]
        if winner_test:
            m3 = mean_of(winner_test)
            gain = m3["value"] - plain_mean["value"]
            error = (m3["stderr"] ** 2 + plain_mean["stderr"] ** 2) ** 0.5
            gains.append((pair, method, gain, error))
            better += gain > 2 * error
            cells += [shown(m3)] + [f"{shown(plain['test'][t])} / {shown(winner_test[t])}" for t in range(2)]
        else:
            gain = None
            cells += [f"(dev {100 * winner['score']:.1f})"] + [f"{shown(plain['test'][t])} / -" for t in range(2)]
        edges += winner["shares"][0] < 0.1 or winner["shares"][0] > 0.9
        cells += [f"{winner['shares'][0]:.4f}", f"{draw['alpha']}, {draw['seed']}",
                  "a baseline was better" if gain is None else f"{100 * gain:+.1f} ± {100 * error:.1f}",
                  f"{fixed['shares'][0]}: {shown(mean_of(fixed['test']))}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## What agrees and what does not", "",
              f"- *M3 beats the plain method*: in {better} of {len(found)} cells by more than two standard errors"
              + (", in {} it is behind.".format(sum(g[2] < 0 for g in gains)) if gains else "."),
              f"- *Many winners lie near an endpoint*: {edges} of {len(found)} winning lambdas are below 0.1 or above 0.9.",
              "- *Equal shares can fail where another ratio keeps both tasks*: see the pictures; math + sentiment is such a pair "
              "(../demo/data, equal shares lose math).",
              "", "## Score against lambda", ""]
    if attacked:
        at = lines.index("## Score against lambda")
        table = ["## Robustness", "",
                 "Exact match without and under an attack on the text of the question (docs/SEARCH.md), and the paper's performance drop rate, PDR = (metric - metric under attack) / "
                 "metric (section 4). `plain` is the plain method, `M3` the best draw; all items of the task, ± one standard error. Models that cannot do a task have nothing to lose: a "
                 "PDR is told where the metric is 10 % at least.", "",
                 "| pair | method | task | attack | plain: metric, attacked, PDR | M3: metric, attacked, PDR |", "| --- | --- | --- | --- | --- | --- |"]
        cell = lambda one: f"{100 * one['plain']['value']:.1f}, {100 * one['attacked']['value']:.1f}, " + (
            shown(one["drop"]) if one["drop"] and one["plain"]["value"] >= 0.1 else "-")
        keys = list(dict.fromkeys((one["pair"], one["method"], one["task"], one["attack"]) for one in attacked))
        for key in keys:
            both = {one["model"]: one for one in attacked if (one["pair"], one["method"], one["task"], one["attack"]) == key}
            table.append("| " + " | ".join(key).replace("+", " + ") + f" | {cell(both['plain'])} | {cell(both['M3'])} |")
        lines[at:at] = table + [""]
        apart, pairs = 0, 0
        for key in keys:
            both = {one["model"]: one["drop"] for one in attacked if (one["pair"], one["method"], one["task"], one["attack"]) == key}
            if all(drop and drop["stderr"] for drop in both.values()):
                pairs += 1
                error = (both["plain"]["stderr"] ** 2 + both["M3"]["stderr"] ** 2) ** 0.5
                apart += abs(both["plain"]["value"] - both["M3"]["value"]) > 2 * error
        lines.insert(at - 1, f"- *M3 makes merges more robust*: in {apart} of {pairs} rows below the drop rates of the two differ by more than "
                             "two standard errors.")
    for pair, method in found:
        name = f"{'-'.join(pair)}-{method.replace(' ', '-').lower()}"
        lines.append(f"![{' + '.join(pair)}, {method}](reproduction/{name}.svg)")
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
