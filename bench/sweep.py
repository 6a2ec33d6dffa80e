"""The driver of bench/sweep.sh: the same search twice."""
import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from merge import ROOT, machine, output_of, results_path
from serve import MODEL, WORK, Service

MODELS = MODEL.parent
TOKENS = {"math": 40, "code": 24, "sentiment": 6}
BAR = 10
BATCHES, PROBED = [8, 16, 32, 64], 64
HERE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(WORK / "datasets")}
TASK = """task: sweep_{task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion.strip()}}}}"
target_delimiter: ""
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: {tokens}
  do_sample: false
  temperature: 0.0
filter_list:
  - name: strip
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def show(line):
    print(line, file=sys.stderr, flush=True)


def ours(pair, seed, items):
    """The sweep as the service tells of it, and the seconds from the start of the server to its end."""
    start = time.perf_counter()
    service = Service("--tasks-dir", str(ROOT / "demo/data"), names=())
    limit = {"limit": items} if items else {}
    tasks = [{"name": task, "file": f"{task}.test.jsonl", "max_tokens": TOKENS[task], "stop": "\n"} | limit for task in pair]
    made = service.ask("POST", "/sweeps", {"recipe": {"method": "average", "models": pair}, "tasks": tasks, "seed": seed,
                                           "split": {"seed": seed, "dev": 0.5}})
    while made["status"] in ("queued", "running"):
        time.sleep(0.2)
        made = service.ask("GET", f"/sweeps/{made['id']}")
    seconds = time.perf_counter() - start
    service.close()
    if made["status"] != "done":
        raise SystemExit(f"the sweep {made['status']}: {made.get('error')}")
    return made, seconds


class Peer:
    """mergekit and lm-eval as their command lines, in a folder that is empty at the start."""

    def __init__(self, pair, batch):
        self.pair, self.batch = pair, batch
        self.folder = WORK / "sweep-peer"
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "tasks").mkdir(parents=True)
        for task in pair:
            text = TASK.format(task=task, file=ROOT / f"demo/data/{task}.test.jsonl", tokens=TOKENS[task])
            (self.folder / "tasks" / f"{task}.yaml").write_text(text)

    def run(self, *command):
        start = time.perf_counter()
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ | HERE)
        if done.returncode:
            raise SystemExit(f"{command}: {done.stderr[-2000:]}")
        return time.perf_counter() - start

    def merge(self, share):
        """The folder of `share` of the first expert and the rest of the second, and seconds."""
        if share in (0.0, 1.0):
            return MODELS / self.pair[0 if share == 1.0 else 1], 0.0
        folder = self.folder / f"merged-{share!r}"
        config = folder.with_suffix(".yaml")
        models = zip(self.pair, (share, 1 - share), strict=True)
        config.write_text(json.dumps({
            "merge_method": "linear", "dtype": "float32", "out_dtype": "bfloat16",
            "models": [{"model": str(MODELS / name), "parameters": {"weight": weight}} for name, weight in models]}))
        return folder, self.run(ROOT / "target/oracle/mergekit/bin/mergekit-yaml", config, folder, "--quiet")

    def evaluate(self, model, samples, batch=None):
        """Items by task of which the answer was right, of those asked; and seconds."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        seconds = self.run(
            ROOT / "target/oracle/transformers/bin/lm_eval", "run", "--model", "hf", "--model_args",
            f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", batch or self.batch, "--include_path",
            self.folder / "tasks", "--tasks", ",".join(f"sweep_{task}" for task in self.pair), "--samples",
            json.dumps({f"sweep_{task}": asked for task, asked in samples.items()}), "--output_path", out, "--log_samples")
        right = {}
        for task in self.pair:
            file, = out.rglob(f"samples_sweep_{task}_*.jsonl")
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            # A run of a subset numbers the documents anew; they come in its order.
            lines.sort(key=lambda line: line["doc_id"])
            found = [line["exact_match"] == 1.0 for line in lines]
            assert len(found) == len(samples[task]), file
            right[task] = {index for index, good in zip(sorted(samples[task]), found, strict=True) if good}
        return right, seconds


def main():
    parser = argparse.ArgumentParser(description="The driver of bench/sweep.sh.")
    parser.add_argument("--pair", default="math+sentiment", type=lambda text: text.split("+"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, help="items a task (200)")
    parser.add_argument("--batch", type=int, help="lm-eval's batch size (without: the fastest of a few, tried before)")
    args = parser.parse_args()
    started = time.time()
    made, seconds = ours(args.pair, args.seed, args.items)
    show(f"ours: {seconds:.1f} s")
    peer, probes = Peer(args.pair, args.batch), {}
    if not args.batch:
        few = {task: list(range(min(PROBED, made["tasks"][0]["items"]))) for task in args.pair}
        for batch in BATCHES:
            probes[batch] = peer.evaluate(MODELS / args.pair[0], few, batch)[1]
            show(f"lm-eval, batch {batch}: {probes[batch]:.1f} s for {PROBED} items a task")
        peer.batch = min(probes, key=probes.get)
    start_lm_eval = peer.run(ROOT / "target/oracle/transformers/bin/python", "-c", "import lm_eval.models.huggingface")
    start_mergekit = peer.run(ROOT / "target/oracle/mergekit/bin/mergekit-yaml", "--help")

    parts = {task["name"]: task["parts"] for task in made["tasks"]}
    dev = {task: [i for i, part in enumerate(parts[task]) if part == "1"] for task in args.pair}
    test = {task: [i for i, part in enumerate(parts[task]) if part == "0"] for task in args.pair}
    all_items = {task: list(range(len(parts[task]))) for task in args.pair}
    rows, known = [], {}
    for trial in made["trials"]:
        # Equal shares are the plain average.
        share = trial["shares"][0] if trial["shares"] else 0.5
        if share not in known:
            folder, merge_s = peer.merge(share)
            # Baselines are told of on all items, draws on the dev items.
            drawn = isinstance(trial["origin"], dict)
            right, eval_s = peer.evaluate(folder, dev if drawn else all_items)
            known[share] = {"folder": folder, "right": right, "merge_s": merge_s, "eval_s": eval_s, "drawn": drawn}
            show(f"lambda {share:.4f}: merge {merge_s:.1f} s, evaluation {eval_s:.1f} s")
        found = known[share]
        scores = [len(found["right"][task] & set(dev[task])) / len(dev[task]) for task in args.pair]
        rows.append({"share": share, "origin": trial["origin"], "peer_dev": scores, "our_dev": [m["value"] for m in trial["dev"]],
                     "peer_score": sum(scores) / len(scores), "our_score": trial["score"], "our_seconds": trial["seconds"]})
    # The first of the best, and what is told of it.
    winner = max(range(len(rows)), key=lambda n: (rows[n]["peer_score"], -n))
    best = known[rows[winner]["share"]]
    right, last_s = best["right"], 0.0
    if best["drawn"]:
        right, last_s = peer.evaluate(best["folder"], test)
    told = [len(right[task] & set(test[task])) / len(test[task]) for task in args.pair]
    our_told = [metric["value"] for metric in made["trials"][made["verdict"]["winner"]]["test"]]
    peer_seconds = sum(found["merge_s"] + found["eval_s"] for found in known.values()) + last_s
    merges = sum(found["merge_s"] > 0 for found in known.values())
    evaluations = len(known) + (last_s > 0)
    starts = merges * start_mergekit + evaluations * start_lm_eval
    same = {
        "winner": winner == made["verdict"]["winner"],
        "dev": sum(row["peer_dev"] == row["our_dev"] for row in rows), "of": len(rows), "test": told == our_told,
    }
    here = machine(WORK)
    result = {"benchmark": "sweep", "date": time.strftime("%Y-%m-%d"), "seconds": time.time() - started,
              "commit": output_of("git", "rev-parse", "HEAD"), "machine": here, "pair": args.pair, "seed": args.seed,
              "items": {task: len(part) for task, part in parts.items()}, "ours_seconds": seconds, "peer_seconds": peer_seconds,
              "peer_starts_seconds": starts, "ratio": peer_seconds / seconds, "lm_eval_batch": peer.batch,
              "lm_eval_batches": probes, "same": same, "winner": rows[winner]["share"], "winner_test": told, "trials": rows,
              "peer_merge_seconds": [found["merge_s"] for found in known.values()],
              "peer_evaluation_seconds": [found["eval_s"] for found in known.values()] + [last_s]}
    path = results_path(ROOT / "bench/results", here["cpu"], result["date"], "sweep")
    path.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(peer.folder)
    print(f"| {' + '.join(args.pair)}, {len(rows)} trials | wall | of it merging | lambda chosen | its test scores |")
    print("| --- | --- | --- | --- | --- |")
    scores = lambda values: " / ".join(f"{value:.3f}" for value in values)
    ours_winner = rows[made["verdict"]["winner"]]
    print(f"| POST /sweeps | {seconds:.0f} s | while the one before is asked | {ours_winner['share']:.4f} | {scores(our_told)} |")
    print(f"| mergekit 0.1.5 + lm-eval hf, batch {peer.batch} | {peer_seconds:.0f} s "
          f"| {sum(found['merge_s'] for found in known.values()):.0f} s | {rows[winner]['share']:.4f} | {scores(told)} |")
    mark = "" if peer_seconds / seconds >= BAR else " (!)"
    print(f"\n{peer_seconds / seconds:.1f} times as fast{mark} (bar {BAR}); without the {starts:.0f} s that Python takes to start "
          f"{merges + evaluations} times, {(peer_seconds - starts) / seconds:.1f}. Dev scores equal in {same['dev']} of "
          f"{same['of']} trials. {path.relative_to(ROOT)}")
    if not same["winner"] or not same["test"]:
        raise SystemExit("the two did not choose the same, or not with the same scores")


if __name__ == "__main__":
    main()
