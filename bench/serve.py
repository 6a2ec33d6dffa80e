"""The driver of bench/serve.sh: runs the parts, the contestants of each in turn, and writes the table and the JSON.

What is measured and against which bar is in the tables at the top; each part is one class below; report() words it.
"""
import argparse
import asyncio
import http.client
import json
import pathlib
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

from merge import ROOT, machine, output_of, results_path

MODEL = ROOT / "target/demo/models/base"
WORK = ROOT / "target/bench"
THREADS = 2
VOCABULARY = 49152
# The peers by precision: transformers' dtype and llama.cpp's file.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
# Bars by part, case and peer: at least so many times the peer's rate at the same precision.
BARS = {
    ("score", "float32", "transformers"): 1.3, ("score", "bfloat16", "transformers"): 1.0,
    ("generate", 1, "llama.cpp"): 0.9, ("generate", 8, "llama.cpp"): 1.2, ("generate", 8, "transformers"): 2.0,
    ("samples", None, "transformers"): 3.0, ("choice", None, "lm-eval hf"): 3.0,
}
OVERHEAD_BAR = 0.05
GOODPUT_BAR = 0.9

SCORE_PROMPTS, SCORE_TOKENS, SCORE_BATCHES = 16, 256, [1, 4, 8, 16]
STREAMS, PROMPT_TOKENS, ANSWER_TOKENS = [1, 8, 32], 32, 64
SAMPLES, SAMPLE_PROMPT_TOKENS = 8, 512
CHOICE_DOCUMENTS, CHOICE_BATCHES, CHOICE_CONCURRENT = 24, [4, 16], 4
RATES, RATE_SECONDS, RATE_TOKENS = [0.5, 1, 2, 5, 10], 12, 16


def prompts(count, tokens, seed):
    """Unrelated token ids, other ones for every seed: nothing of them is in a cache."""
    rng = random.Random(seed)
    return [[rng.randrange(300, VOCABULARY) for _ in range(tokens)] for _ in range(count)]


class Peer:
    """A process that answers one line of JSON with another."""

    def __init__(self, *command):
        self.process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.version = self.read()["version"]

    def read(self):
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.process.args}: ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, do, **task):
        self.process.stdin.write(json.dumps({"do": do} | task) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Service:
    """Our server, with the model under the name of each precision."""

    def __init__(self, *flags, names=tuple(PRECISIONS)):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.data = tempfile.TemporaryDirectory(dir=WORK)
        self.process = subprocess.Popen(
            [ROOT / "target/release/cauldron", "serve", "--listen", f"127.0.0.1:{self.port}", "--data-dir", self.data.name,
             "--models-dir", MODEL.parent, "--log", "error", *flags], cwd=ROOT)
        for _ in range(300):
            try:
                urllib.request.urlopen(self.url + "/readyz").close()
                break
            except OSError:
                time.sleep(0.1)
        for name in names:
            self.ask("POST", "/models", {"name": name, "source": MODEL.name, "dtype": name})
            while self.ask("GET", f"/models/{name}")["status"] == "loading":
                time.sleep(0.1)

    def ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def score(self, model, prompts):
        start = time.perf_counter()
        answer = self.ask("POST", "/v1/completions", {
            "model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True})
        seconds = time.perf_counter() - start
        sums = [sum(choice["logprobs"]["token_logprobs"][1:-1]) for choice in answer["choices"]]
        return {"seconds": seconds, "sums": sums}

    def stream(self, model, prompt, tokens, **more):
        """Times of the events of one streamed answer: one a token, but for tokens that end within a character."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}}
        connection.request("POST", "/v1/completions", json.dumps(body | more), {"Content-Type": "application/json"})
        response, times = connection.getresponse(), []
        assert response.status == 200, response.read()
        while line := response.readline():
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
                last = line
        connection.close()
        assert json.loads(last[6:])["usage"]["completion_tokens"] == tokens, last
        return times[:-1]

    def generate(self, model, prompts, tokens):
        out, start = [None] * len(prompts), time.perf_counter()

        def one(index):
            out[index] = self.stream(model, prompts[index], tokens)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "first": [times[0] - start for times in out],
                "gaps": [b - a for times in out for a, b in zip(times, times[1:])]}

    def samples(self, model, prompt, tokens, n):
        start = time.perf_counter()
        answer = self.ask("POST", "/v1/completions", {
            "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": 1, "n": n, "ignore_eos": True})
        seconds = time.perf_counter() - start
        assert answer["usage"]["completion_tokens"] == n * tokens, answer["usage"]
        return {"seconds": seconds}

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.data.cleanup()


class Bench:
    def __init__(self, args):
        self.args, self.found, self.versions, self.peers = args, [], {}, {}

    def peer(self, kind, precision):
        key = f"{kind} {precision}"
        if key not in self.peers:
            if kind == "transformers":
                command = ["target/oracle/transformers/bin/python", "bench/peer_transformers.py", MODEL, precision, THREADS]
            else:
                file = WORK / f"base-{PRECISIONS[precision]}.gguf"
                command = ["target/oracle/llama/bin/python", "bench/peer_llama.py", file, THREADS]
            self.peers[key] = Peer(*command)
            self.versions[kind] = self.peers[key].version
        return self.peers[key]

    def note(self, part, case, precision, who, work, result, **more):
        gaps, first = result.get("gaps") or [], result.get("first") or []
        first = first if isinstance(first, list) else [first]
        sample = {"part": part, "case": case, "precision": precision, "who": who, "rate": work / result["seconds"],
                  "seconds": result["seconds"], **more}
        for name, values in (("first", first), ("gap", gaps)):
            if values:
                ordered = sorted(values)
                sample |= {f"{name}_p50": statistics.median(values), f"{name}_p99": ordered[int(0.99 * (len(ordered) - 1))]}
        self.found.append(sample)
        print(f"{part} {case} {precision} {who}: {sample['rate']:.2f}/s", file=sys.stderr, flush=True)
        return sample

    def run(self):
        parts = self.args.only or ["score", "choice", "generate", "samples", "overhead", "overload"]
        service = Service()
        try:
            for part in parts:
                if part != "overload":
                    getattr(self, part)(service)
        finally:
            service.close()
            [peer.close() for peer in self.peers.values()]
        if "overload" in parts:
            self.overload()

    def score(self, service):
        count = 4 if self.args.quick else SCORE_PROMPTS
        for precision in PRECISIONS:
            peer = self.peer("transformers", precision)
            tuned = {b: peer.ask("score", prompts=prompts(count, SCORE_TOKENS, -b), batch=b)["seconds"] for b in SCORE_BATCHES}
            batch = min(tuned, key=tuned.get)
            for repeat in range(self.args.repeats):
                some = prompts(count, SCORE_TOKENS, repeat)
                theirs, ours = peer.ask("score", prompts=some, batch=batch), service.score(precision, some)
                worst = max(abs(a - b) / SCORE_TOKENS for a, b in zip(ours["sums"], theirs["sums"], strict=True))
                assert worst < (1e-4 if precision == "float32" else 5e-2), worst
                tokens = count * SCORE_TOKENS
                self.note("score", "unrelated", precision, "transformers", tokens, theirs, batch=batch)
                self.note("score", "unrelated", precision, "ours", tokens, ours, difference=worst)

    def choice(self, service):
        folder = choice_tasks(6 if self.args.quick else CHOICE_DOCUMENTS)
        run = lambda *rest: json.loads(subprocess.run(
            ["target/oracle/transformers/bin/python", "bench/lmeval_choice.py", folder, *map(str, rest)], cwd=ROOT, check=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip().split("\n")[-1])
        for task in ("four_choices_0shot", "four_choices_5shot"):
            hf = lambda batch: run(task, "hf", MODEL, "float32", batch)
            first = {batch: hf(batch) for batch in CHOICE_BATCHES}
            batch = min(first, key=lambda b: first[b]["seconds"])
            for repeat in range(self.args.repeats):
                theirs = first[batch] if repeat == 0 else hf(batch)
                # A model of its own each time: what the last round left in the prefix cache would be no comparison.
                name = f"choice-{task}-{repeat}"
                service.ask("POST", "/models", {"name": name, "source": MODEL.name})
                service.ask("POST", "/v1/completions", {"model": name, "prompt": [1, 2, 3], "max_tokens": 1})
                ours = run(task, "served", service.url, name, CHOICE_CONCURRENT)
                urllib.request.urlopen(urllib.request.Request(f"{service.url}/models/{name}", method="DELETE")).close()
                assert ours["accuracy"] == theirs["accuracy"], (ours, theirs)
                self.note("choice", task, "float32", "lm-eval hf", theirs["requests"], theirs, batch=batch)
                self.note("choice", task, "float32", "ours", ours["requests"], ours)

    def generate(self, service):
        for repeat in range(self.args.repeats):
            for streams in STREAMS[:2] if self.args.quick else STREAMS:
                for precision in PRECISIONS:
                    some = prompts(streams, PROMPT_TOKENS, 100 * repeat + streams)
                    tokens = streams * ANSWER_TOKENS
                    ours = service.generate(precision, some, ANSWER_TOKENS)
                    llama = self.peer("llama.cpp", precision).ask("generate", prompts=some, tokens=ANSWER_TOKENS)
                    theirs = self.peer("transformers", precision).ask("generate", prompts=some, tokens=ANSWER_TOKENS)
                    for who, result in (("ours", ours), ("llama.cpp", llama), ("transformers", theirs)):
                        self.note("generate", streams, precision, who, tokens, result)

    def samples(self, service):
        for repeat in range(self.args.repeats):
            prompt = prompts(1, SAMPLE_PROMPT_TOKENS, 5000 + repeat)[0]
            for precision in PRECISIONS:
                for who in ("ours", "transformers", "llama.cpp"):
                    result = self.samples_of(who, precision, prompt, service)
                    self.note("samples", SAMPLES, precision, who, SAMPLES * ANSWER_TOKENS, result)

    def samples_of(self, who, precision, prompt, service):
        tokens = ANSWER_TOKENS
        if who == "ours":
            return service.samples(precision, prompt, tokens, SAMPLES)
        return self.peer(who, precision).ask("generate", prompts=[prompt], tokens=tokens, copies=SAMPLES)

    def overhead(self, service):
        """Tokens a second of the engine in a process of its own, and over HTTP."""
        for repeat in range(self.args.repeats):
            for streams in (1, 8):
                case = f"decode:{streams}x{ANSWER_TOKENS}@{PROMPT_TOKENS}"
                out = subprocess.run([ROOT / "target/release/examples/speed", MODEL, case], check=True, stdout=subprocess.PIPE, text=True)
                rate = float(re.search(r"([\d.]+) tokens/s", out.stdout)[1])
                tokens = streams * (ANSWER_TOKENS - 1)
                self.note("overhead", streams, "float32", "engine alone", tokens, {"seconds": tokens / rate})
                ours = service.generate("float32", prompts(streams, PROMPT_TOKENS, 7000 + 100 * repeat + streams), ANSWER_TOKENS)
                # From the moment all have their first token, as the engine is measured.
                seconds = ours["seconds"] - max(ours["first"])
                self.note("overhead", streams, "float32", "ours", tokens, {"seconds": seconds})

    def overload(self):
        service = Service("--max-waiting", "64", "--hold-seconds", "2", names=("float32",))
        try:
            load = lambda rate, seconds: asyncio.run(open_loop(service.port, rate, seconds))
            start = time.perf_counter()
            closed = 16 if self.args.quick else 64
            some = prompts(closed, PROMPT_TOKENS, 9000)
            service.generate("float32", some, RATE_TOKENS)
            capacity = closed / (time.perf_counter() - start)
            self.note("overload", "closed loop", "float32", "ours", closed, {"seconds": closed / capacity})
            for times in RATES[1:3] if self.args.quick else RATES:
                seconds = 3 if self.args.quick else RATE_SECONDS
                result = load(capacity * times, seconds)
                sample = {"part": "overload", "case": times, "precision": "float32", "who": "ours", "offered": capacity * times} | result
                self.found.append(sample)
                print(sample, file=sys.stderr, flush=True)
        finally:
            service.close()


async def open_loop(port, rate, seconds):
    """Requests at random times, whatever becomes of those before."""
    rng, tasks, start = random.Random(rate), [], time.perf_counter()
    loop_end, at, index = start + seconds, start, 0

    async def one(index):
        begun = time.perf_counter()
        body = json.dumps({"model": "float32", "prompt": prompts(1, PROMPT_TOKENS, hash((rate, index)))[0], "temperature": 0,
                           "max_tokens": RATE_TOKENS, "ignore_eos": True}).encode()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                         b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            answer = await reader.read()
            writer.close()
            status = int(answer.split(b" ", 2)[1]) if answer else 0
        except OSError:
            status = 0
        return status, time.perf_counter() - begun, time.perf_counter()

    while at < loop_end:
        await asyncio.sleep(max(0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(index)))
        at += rng.expovariate(rate)
        index += 1
    done = await asyncio.gather(*tasks)
    good = [d for d in done if d[0] == 200]
    refused = [d for d in done if d[0] in (429, 503)]
    within = [d for d in good if d[2] <= loop_end]
    quantile = lambda values, q: sorted(values)[int(q * (len(values) - 1))] if values else None
    return {"requests": len(done), "answered": len(good), "refused": len(refused), "failed": len(done) - len(good) - len(refused),
            "goodput": len(within) / seconds, "latency_p50": quantile([d[1] for d in good], 0.5),
            "latency_p99": quantile([d[1] for d in good], 0.99), "refusal_p50": quantile([d[1] for d in refused], 0.5)}


def choice_tasks(documents):
    """Two lm-eval tasks of four choices of several tokens each: about long questions of their own, and with five solved ones
    before each, the same for all."""
    folder = WORK / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (ROOT / "demo/data/math.test.jsonl").read_text().splitlines()]
    rng = random.Random(1)
    shots = "\n\n".join(line["prompt"] + line["completion"] for line in lines[-5:]) + "\n\n"
    for task, context in (("four_choices_0shot", None), ("four_choices_5shot", shots)):
        rows = []
        for i, line in enumerate(lines[:documents]):
            story = " ".join(l["prompt"].split("\n")[0].removeprefix("Question: ") for l in rng.sample(lines, 6))
            head = context if context else f"Notes: {story}\n"
            wrong = []
            while len(wrong) < 3:
                other = re.sub(r"\d+", lambda m: str(max(1, int(m[0]) + rng.randint(-9, 9))), line["completion"])
                if other != line["completion"] and other not in wrong:
                    wrong.append(other)
            gold = rng.randrange(4)
            choices = [c.strip() for c in wrong]
            choices.insert(gold, line["completion"].strip())
            rows.append(json.dumps({"query": head + line["prompt"], "choices": choices, "gold": gold}))
        (folder / f"{task}.jsonl").write_text("\n".join(rows) + "\n")
        (folder / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / task}.jsonl\ntest_split: test\n"
            "output_type: multiple_choice\ndoc_to_text: \"{{query}}\"\ndoc_to_choice: \"{{choices}}\"\ndoc_to_target: \"{{gold}}\"\n"
            "target_delimiter: \" \"\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
            "metadata:\n  version: 1\n")
    return folder


def report(found):
    rates = {}
    for s in found["samples"]:
        if "rate" in s:
            rates.setdefault((s["part"], s["case"], s["precision"]), {}).setdefault(s["who"], []).append(s)
    median = lambda samples, field="rate": statistics.median(s[field] for s in samples)
    print(f"{found['machine']['cpu']}, {found['machine']['cores']} cores; {found['versions']}; commit {found['commit'][:8]}\n")
    print("| part | case | precision | ours, 1/s | peer, 1/s | peer | ratio | bar |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (part, case, precision), by_who in rates.items():
        for who, samples in by_who.items():
            if who == "ours" or "ours" not in by_who or part == "overload":
                continue
            ours, theirs = median(by_who["ours"]), median(samples)
            bar = next((BARS[key] for key in ((part, case, who), (part, precision, who), (part, None, who)) if key in BARS), None)
            if part == "overhead":
                bar = 1 - OVERHEAD_BAR
            verdict = "" if bar is None else f"{bar:g} {'met' if ours / theirs >= bar else 'MISSED'}"
            print(f"| {part} | {case} | {precision} | {ours:.1f} | {theirs:.1f} | {who} | {ours / theirs:.2f} | {verdict} |")
    rows = [(key, samples) for key, by_who in rates.items() for who, samples in by_who.items()
            if who == "ours" and key[0] == "generate"]
    if rows:
        print("\n| streams | precision | first token p50 / p99, ms | between tokens p50 / p99, ms |\n| --- | --- | --- | --- |")
        for (_, case, precision), samples in rows:
            ms = [1000 * median(samples, field) for field in ("first_p50", "first_p99", "gap_p50", "gap_p99")]
            print(f"| {case} | {precision} | {ms[0]:.0f} / {ms[1]:.0f} | {ms[2]:.1f} / {ms[3]:.1f} |")
    loads = [s for s in found["samples"] if s["part"] == "overload" and "offered" in s]
    if loads:
        peak = max(s["goodput"] for s in loads)
        print("\n| load | offered, 1/s | answered | refused | failed | goodput, 1/s | latency p50 / p99, s | refusal p50, s |\n"
              "| --- | --- | --- | --- | --- | --- | --- | --- |")
        for s in loads:
            number = lambda v: "-" if v is None else f"{v:.2f}"
            print(f"| {s['case']}x | {s['offered']:.1f} | {s['answered']} | {s['refused']} | {s['failed']} | {s['goodput']:.1f} | "
                  f"{number(s['latency_p50'])} / {number(s['latency_p99'])} | {number(s['refusal_p50'])} |")
        share = loads[-1]["goodput"] / peak
        print(f"\nGoodput at {loads[-1]['case']}x load is {share:.0%} of the peak (bar {GOODPUT_BAR:.0%}: "
              f"{'met' if share >= GOODPUT_BAR else 'MISSED'}).")


def main():
    parser = argparse.ArgumentParser(description="The driver of bench/serve.sh.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="append", choices=["score", "choice", "generate", "samples", "overload", "overhead"])
    parser.add_argument("--report", type=pathlib.Path)
    args = parser.parse_args()
    if args.report:
        return report(json.loads(args.report.read_text()))
    if args.quick:
        args.repeats = 1
    started, bench = time.time(), Bench(args)
    bench.run()
    here = machine(WORK)
    found = {"benchmark": "serve", "date": time.strftime("%Y-%m-%d"), "started": started, "seconds": time.time() - started,
             "quick": args.quick, "commit": output_of("git", "rev-parse", "HEAD"), "machine": here,
             "versions": bench.versions, "samples": bench.found}
    if not args.quick:
        path = results_path(ROOT / "bench/results", here["cpu"], found["date"], "serve")
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(path)
    report(found)


if __name__ == "__main__":
    main()
