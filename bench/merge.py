"""The driver of bench/merge.sh: runs the merges and the limits, alternating, and writes the table and the JSON.

It must stay small and import nothing big: a child's peak memory, as the kernel reports it, starts at its parent's.
What is measured, and against which bar, is in the tables at the top; the wording of the report is in report().
"""
import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TMPFS = pathlib.Path("/dev/shm")
EXPERTS = ["a", "b", "c"]
CELLS = ["tmpfs/warm", "tmpfs/cold", "disk/warm", "disk/cold"]

# Parameters of mergekit's configuration by method. ties also runs our global variant, against mergekit's ties.
METHODS = ["linear", "task_arithmetic", "ties", "dare_ties", "della", "slerp"]
WEIGHTS = {2: [0.6, 0.4], 3: [0.5, 0.3, 0.2]}
DENSITY, EPSILON, SLERP_T = 0.5, 0.15, 0.4
GLOBAL_TIES = "ties (global)"
# A second run of ours, whose data folder knows the content digests of the parents from the run before: what every further
# merge of the same parents costs.
KNOWN = ", known parents"

# The bars: how often faster than mergekit with the output on tmpfs; how often slower than reading and writing with the
# output on disk; peak memory.
SPEED_BARS = {"linear": 8, "task_arithmetic": 8, "ties": 25, GLOBAL_TIES: 25, "dare_ties": 25, "della": 25}
LIMIT_BARS = {method: 1.3 for method in METHODS} | {GLOBAL_TIES: 1.6}
MEMORY_BAR = 600e6

# mergekit-yaml: what helps any run, and the variants of which the fastest is looked for before the run.
# Not among them: --lazy-unpickle (pickled checkpoints only), --low-cpu-memory, --read-to-gpu, --gpu-rich and --multi-gpu
# (accelerators only), --num-threads (torch takes all cores by itself).
COMMON_FLAGS = "--quiet --no-copy-tokenizer --no-write-model-card --random-seed 1"
FLAG_VARIANTS = [
    "",
    "--async-write --write-threads 2",
    "--async-write --write-threads 2 --out-shard-size 500M",
    "--out-shard-size 500M",
]
QUICK_FLAGS = FLAG_VARIANTS[1]

# The limits of a cell: how the inputs are read, how the output is written, block, threads (0: four a core, so that the
# disk's queue is full; the others have one a core). The fastest counts.
BLOCK = 4 << 20
LIMITS = {
    "tmpfs/warm": [("buffered", "tmpfs", BLOCK, 1), ("buffered", "tmpfs", 1 << 20, 1)],
    "tmpfs/cold": [("buffered", "tmpfs", BLOCK, 1), ("direct", "tmpfs", BLOCK, 1), ("direct", "tmpfs", BLOCK, 0)],
    "disk/warm": [("buffered", "buffered", BLOCK, 1), ("buffered", "early", BLOCK, 1), ("buffered", "direct", BLOCK, 1),
                  ("buffered", "direct", BLOCK, 0)],
    "disk/cold": [("buffered", "buffered", BLOCK, 1), ("buffered", "early", BLOCK, 1), ("direct", "direct", BLOCK, 1),
                  ("direct", "direct", BLOCK, 0)],
}


def say(*words):
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


# ---- what is merged ----

def mergekit_config(method, experts):
    """The configuration, with models named as folders beside each other, so that it serves both programs."""
    names, weights = EXPERTS[:experts], WEIGHTS[experts]
    config = {"merge_method": method, "dtype": "bfloat16"}
    if method == "slerp":
        return config | {"base_model": names[0], "models": [{"model": name} for name in names], "parameters": {"t": SLERP_T}}
    each = {"density": DENSITY} if method in ("ties", "dare_ties", "della") else {}
    each |= {"epsilon": EPSILON} if method == "della" else {}
    if method != "linear":
        config |= {"base_model": "base"}
    config["models"] = [{"model": name, "parameters": {"weight": weight} | each} for name, weight in zip(names, weights)]
    if method in ("linear", "ties"):
        config["parameters"] = {"normalize": True}
    return config


def global_ties_recipe(experts):
    return {"method": "ties", "base": "base", "models": EXPERTS[:experts], "retain": DENSITY, "scaling": 1.0, "dtype": "bfloat16"}


def inputs_of(method, experts):
    return ([] if method in ("linear", "slerp") else ["base"]) + EXPERTS[:experts]


def write_configs(folder, methods, experts):
    """The files for both programs: {method: path}, global ties under its own name."""
    import yaml
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for method in methods:
        paths[method] = folder / f"{method}-{experts}.yaml"
        paths[method].write_text(yaml.safe_dump(mergekit_config(method, experts), sort_keys=False))
        if method == "ties":
            paths[GLOBAL_TIES] = folder / f"ties-global-{experts}.json"
            paths[GLOBAL_TIES].write_text(json.dumps(global_ties_recipe(experts)) + "\n")
    return paths


def ours_command(template, config, models, data):
    places = {"{config}": str(config), "{models}": str(models), "{data}": str(data)}
    return [re.sub(r"\{(config|models|data)\}", lambda place: places[place[0]], word) for word in shlex.split(template)]


# ---- one run of a program ----

def machine_ticks():
    """CPU seconds of the whole machine so far: busy, and stolen by the hypervisor."""
    fields = [int(n) / os.sysconf("SC_CLK_TCK") for n in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, soft, steal = fields[:8]
    return user + nice + system + irq + soft, steal


def watch_memory(pid, peaks, done):
    """The anonymous and the mapped-file part of the resident memory apart, by looking often; the kernel's own peak has both."""
    while not done.wait(0.05):
        try:
            status = pathlib.Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        for part in ("RssAnon", "RssFile"):
            if found := re.search(rf"^{part}:\s+(\d+) kB", status, re.M):
                peaks[part] = max(peaks[part], int(found[1]) * 1024)


def run(command, *, cwd, env, log, limit_s):
    """Runs a command to its end: wall, CPU and peak memory, of it and its children."""
    peaks, done = {"RssAnon": 0, "RssFile": 0}, threading.Event()
    load, (busy, stolen) = os.getloadavg()[0], machine_ticks()
    with open(log, "wb") as out:
        start = time.perf_counter()
        child = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        watcher = threading.Thread(target=watch_memory, args=(child.pid, peaks, done), daemon=True)
        watcher.start()
        timer = threading.Timer(limit_s, os.killpg, (child.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
            done.set()
        wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    busy_after, stolen_after = machine_ticks()
    return {
        "status": child.returncode,
        "process_s": wall,
        "user_s": used.ru_utime,
        "system_s": used.ru_stime,
        "peak_rss": used.ru_maxrss * 1024,
        "peak_rss_anonymous": peaks["RssAnon"],
        "peak_rss_files": peaks["RssFile"],
        "load_before": load,
        "others_cpu_s": max(0.0, busy_after - busy - used.ru_utime - used.ru_stime),
        "stolen_s": stolen_after - stolen,
    }


def sync_tree(folder):
    """fsync of everything under a folder. For a program that has synced what it wrote this takes no time."""
    start = time.perf_counter()
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    return time.perf_counter() - start


def tensors_of(folder):
    """{name: (dtype, shape)} of the safetensors files under a folder."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        found |= {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size < end:
            raise ValueError(f"{path} is shorter than its header says")
    return found


class Bench:
    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.cores = os.cpu_count()
        self.models = folder / "models" / f"llama-{args.parameters // 1_000_000}M"
        self.tool = folder / "limits"
        self.failures = 0
        self.outputs = {}
        # mergekit would ask the hub about names that are not paths.
        self.env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def make_models(self):
        names = ["base"] + EXPERTS[: max(self.args.experts)]
        made = subprocess.run([sys.executable, ROOT / "bench" / "random_llama.py", self.models, str(self.args.parameters), *names],
                              check=True, stdout=subprocess.PIPE)
        self.llama = json.loads(made.stdout)
        self.expected = tensors_of(self.models / "base")

    def make_outputs(self):
        size = self.llama["bytes"]
        if any(cell.startswith("tmpfs") for cell in self.args.cells):
            free = shutil.disk_usage(TMPFS).free
            memory = memory_of("MemAvailable")
            inputs, mergekit = (1 + max(self.args.experts)) * size, 2.6 * size + 1e9
            if free < 1.2 * size or memory < 1.2 * size + mergekit:
                sys.exit(f"{TMPFS}: {free / 1e9:.1f} GB free and {memory / 1e9:.1f} GB of memory; output is {size / 1e9:.1f} GB")
            if memory_of("MemTotal") < inputs + size + mergekit:
                say("warning: not all inputs may stay in the page cache while mergekit runs; see resident_after in the JSON")
            self.outputs["tmpfs"] = pathlib.Path(tempfile.mkdtemp(prefix="cauldron-bench-", dir=TMPFS))
        if any(cell.startswith("disk") for cell in self.args.cells):
            self.outputs["disk"] = pathlib.Path(tempfile.mkdtemp(prefix="out-", dir=self.folder))

    def clean(self):
        for folder in self.outputs.values():
            shutil.rmtree(folder, ignore_errors=True)

    def limits(self, *words):
        done = subprocess.run([self.tool, *map(str, words)], check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout)

    def weights(self, names):
        return [self.models / name / "model.safetensors" for name in names]

    def prepare(self, cache, names):
        """Empties the output folders' past, settles the disk, and brings the page cache of the inputs into its state."""
        os.sync()
        for _ in range(3):
            found = self.limits("warm" if cache == "warm" else "evict", *self.weights(names))
            share = found["resident"] / found["bytes"]
            if (share > 0.999) if cache == "warm" else (share < 0.001):
                break
        else:
            say(f"warning: {share:.1%} of the inputs are in the page cache, which should be {cache}")
        time.sleep(0.2 if self.args.quick else 1.0)
        return share

    def merge(self, who, command, cell, names, cwd, keep=None):
        """One merge of one program into an empty folder; the folder is deleted, but for what it learned of the parents."""
        output, cache = cell.split("/")
        target = self.outputs[output] / "merged"
        share = self.prepare(cache, names)
        log = self.folder / "last-run.log"
        sample = {"who": who, "resident_before": share}
        sample |= run(command, cwd=cwd, env=self.env, log=log, limit_s=self.args.timeout)
        sample["sync_s"] = sync_tree(target) if output == "disk" and target.exists() else 0.0
        sample["wall_s"] = sample["process_s"] + sample["sync_s"]
        after = self.limits("resident", *self.weights(names))
        sample["resident_after"] = after["resident"] / after["bytes"]
        try:
            if sample["status"] != 0:
                raise ValueError(f"exit status {sample['status']}")
            if tensors_of(target) != self.expected:
                raise ValueError("the output does not have the base's tensors")
        except (ValueError, OSError) as error:
            tail = log.read_text(errors="replace").strip().splitlines()[-5:]
            sample["error"] = "\n".join([str(error), *tail])
            self.failures += 1
            say(f"{who} failed: {sample['error']}")
        else:
            say(f"{cell:<11}{who:<28}{sample['wall_s']:9.2f} s  CPU {sample['user_s'] + sample['system_s']:8.2f} s"
                f"  {sample['peak_rss'] / 1e6:7.0f} MB")
        if keep and (target / "contents").exists():
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(target / "contents", keep)
        shutil.rmtree(target, ignore_errors=True)
        return sample

    def ours(self, method, config, cell, names, known=False):
        target = self.outputs[cell.split("/")[0]] / "merged"
        contents = self.folder / "contents"
        if known:
            shutil.copytree(contents, target / "contents")
        command = ours_command(self.args.ours, config.resolve(), self.models, target)
        shown = method + KNOWN if known else method
        keep = None if known else contents
        return {"method": shown, **self.merge(f"ours {shown}", command, cell, names, ROOT, keep)}

    def mergekit(self, method, config, cell, names, flags):
        target = self.outputs[cell.split("/")[0]] / "merged"
        command = [self.args.mergekit / "bin" / "mergekit-yaml", config.resolve(), target, *shlex.split(flags)]
        return {"method": method, "flags": flags, **self.merge(f"mergekit {method}", command, cell, names, self.models)}

    def passes(self, cell, names):
        """Each limit of a cell once."""
        output, cache = cell.split("/")
        found = []
        for read, write, block, threads in LIMITS[cell]:
            threads = threads * self.cores or 4 * self.cores
            out = self.outputs[output] / "pass"
            self.prepare(cache, names)
            found.append(self.limits("pass", read, write, out, block, threads, *self.weights(names)))
            out.unlink()
        return found

    def startup(self):
        """mergekit's start, with its files in the page cache: `mergekit-yaml --help`, the second of two."""
        command = [self.args.mergekit / "bin" / "mergekit-yaml", "--help"]
        for _ in range(2):
            sample = run(command, cwd=self.models, env=self.env, log=self.folder / "last-run.log", limit_s=self.args.timeout)
        return sample

    def probe_flags(self, config):
        """The fastest flags by output: each variant once, linear, page cache warm."""
        found = []
        for output in self.outputs:
            for variant in FLAG_VARIANTS:
                sample = self.mergekit("linear", config, f"{output}/warm", inputs_of("linear", 2), f"{COMMON_FLAGS} {variant}".strip())
                found.append({"output": output, **sample})
        return found


# ---- the machine ----

def memory_of(field):
    return int(re.search(rf"^{field}:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text(), re.M)[1]) * 1024


def read_or_none(path):
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return None


def output_of(*command):
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def disk_of(folder):
    """The filesystem and the block device under a folder."""
    mounts = []
    for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        _, _, numbers, _, point, options = left.split()[:6]
        kind, source, more = right.split()[:3]
        if folder.resolve().is_relative_to(point):
            mounts.append((len(point), {"device": source, "filesystem": kind, "options": f"{options},{more}", "numbers": numbers}))
    disk = max(mounts, key=lambda mount: mount[0])[1]
    block = pathlib.Path("/sys/dev/block") / disk.pop("numbers")
    queue = next((path for path in (block / "queue", block / ".." / "queue") if path.is_dir()), block)
    usage = shutil.disk_usage(folder)
    return disk | {"model": read_or_none(queue / ".." / "device" / "model"), "scheduler": read_or_none(queue / "scheduler"),
                   "rotational": read_or_none(queue / "rotational"), "size": usage.total, "free": usage.free}


def machine(folder):
    cpu = pathlib.Path("/proc/cpuinfo").read_text()
    field = lambda name: (found := re.search(rf"^{name}\s*:\s*(.*)$", cpu, re.M)) and found[1].strip()
    flags = (field("flags") or "").split()
    return {
        "cpu": field("model name") or platform.processor() or platform.machine(),
        "family/model/stepping": "/".join(field(name) or "?" for name in ("cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "vectors": [flag for flag in ("avx2", "f16c", "avx512f", "avx512bw", "avx512_bf16") if flag in flags],
        "cache": field("cache size"),
        "hypervisor": "hypervisor" in flags,
        "memory": memory_of("MemTotal"),
        "kernel": platform.release(),
        "huge_pages": read_or_none("/sys/kernel/mm/transparent_hugepage/enabled"),
        "disk": disk_of(folder),
        "tmpfs": shutil.disk_usage(TMPFS).total,
    }


def versions(args):
    from importlib import metadata
    def installed(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None
    packages = {name: installed(name) for name in ("mergekit", "torch", "transformers", "safetensors", "numpy")}
    binary = shlex.split(args.ours)[0]
    return {
        "cauldron": output_of(binary, "--version") if pathlib.Path(binary).name == "cauldron" else None,
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed_files": len((output_of("git", "status", "--porcelain") or "").splitlines()),
        "python": platform.python_version(),
        "rustc": output_of("rustc", "--version"),
        "cc": (output_of(os.environ.get("CC", "cc"), "--version") or "").split("\n")[0],
    } | packages


def results_path(folder, cpu, date, kind="merge"):
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", "", cpu.lower())).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{kind}-{date}-{slug}"
    taken = [folder / f"{stem}.json", *(folder / f"{stem}-{n}.json" for n in range(2, 1000))]
    return next(path for path in taken if not path.exists())


# ---- the report ----

def median_of(samples, field):
    values = [field(sample) for sample in samples if "error" not in sample]
    return statistics.median(values) if values else None


def limit_of(result, experts, cell, inputs):
    """The fastest way of reading these inputs and writing the output, by its median over the run: seconds, and which."""
    ways = {}
    for entry in result["limits"]:
        if (entry["experts"], entry["cell"], entry["inputs"]) == (experts, cell, inputs):
            way = f"{entry['read']} reads, {entry['write']} writes, {entry['threads']} threads, {entry['block'] >> 20} MiB"
            ways.setdefault(way, []).append(entry["wall_s"])
    return min(((statistics.median(times), way) for way, times in ways.items()), default=(None, None))


def shown(value, digits=2, unit=""):
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def rows_of(result):
    """One row a method and cell, with its bars: (text, kept or not)."""
    size, bandwidth = result["llama"]["bytes"], result["bandwidth_bytes_per_second"]
    for entry in result["merges"]:
        experts, cell = entry["experts"], entry["cell"]
        seconds, way = limit_of(result, experts, cell, entry["inputs"])
        theirs = [sample for sample in entry["samples"] if sample["who"].startswith("mergekit")]
        for method in dict.fromkeys(sample["method"] for sample in entry["samples"] if sample["who"].startswith("ours")):
            ours = [sample for sample in entry["samples"] if sample["who"] == f"ours {method}"]
            row = {"experts": experts, "cell": cell, "method": method, "limit": seconds, "way": way,
                   "read": len(entry["inputs"]),
                   "memory": size * (len(entry["inputs"]) + 1) / bandwidth}
            for name, samples in (("ours", ours), ("theirs", theirs)):
                row[name] = {
                    "wall": median_of(samples, lambda s: s["wall_s"]),
                    "cpu": median_of(samples, lambda s: s["user_s"] + s["system_s"]),
                    "rss": median_of(samples, lambda s: s["peak_rss"]),
                }
            row["failed"] = any("error" in sample for sample in ours)
            mine, other = row["ours"], row["theirs"]["wall"]
            row["faster"] = other / mine["wall"] if mine["wall"] and other else None
            row["slower"] = mine["wall"] / seconds if mine["wall"] and seconds else None
            row["bars"] = bars = []
            plain = method.removesuffix(KNOWN)
            if cell.startswith("tmpfs") and plain in SPEED_BARS and row["faster"]:
                bars.append((f"speed >= {SPEED_BARS[plain]}x", row["faster"] >= SPEED_BARS[plain]))
            if cell.startswith("disk") and row["slower"]:
                bars.append((f"limit <= {LIMIT_BARS[plain]}x", row["slower"] <= LIMIT_BARS[plain]))
            if mine["rss"]:
                bars.append((f"memory < {MEMORY_BAR / 1e6:.0f} MB", mine["rss"] < MEMORY_BAR))
            yield row


def report(result):
    """The run in Markdown."""
    box, llama, version = result["machine"], result["llama"], result["versions"]
    disk = box["disk"]
    lines = [
        f"# Merging, {result['date']}" + (" (quick: these numbers mean nothing)" if result["quick"] else ""),
        "",
        f"- Machine: {box['cpu']} ({box['cores']} cores, {', '.join(box['vectors'])}), {box['memory'] / 2**30:.0f} GiB, Linux {box['kernel']}, "
        f"{disk['device']} {disk['filesystem']} ({disk['scheduler']})" + (", virtual" if box["hypervisor"] else ""),
        f"- Copy in memory: {result['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, read + written, best of: "
        + ", ".join(f"{name} {rate['best'] / 1e9:.1f}" for name, rate in result["copy"]["bytes_per_second"].items()),
        f"- Checkpoints: {llama['parameters'] / 1e6:.0f}M parameters, bfloat16, {llama['bytes'] / 1e9:.2f} GB each, one file",
        f"- Ours: commit {(version['commit'] or '-')[:12]} with {version['changed_files']} changed files, {version['rustc']}; `{result['ours']}`",
        f"- mergekit {version['mergekit']}, torch {version['torch']}, Python {version['python']}; flags "
        + "; ".join(f"{output}: `{flags}`" for output, flags in result["mergekit_flags"].items()),
    ]
    if result.get("mergekit_startup"):
        lines.append(f"- Of every mergekit time, {result['mergekit_startup']['process_s']:.1f} s are its start (`mergekit-yaml --help`)")
    lines += [
        "- Times are medians. Disk: what a program leaves unsynced is fsynced after it, and counts. Cold: each input file was dropped"
        " from the page cache by posix_fadvise(DONTNEED), checked by mincore; programs, libraries and the host's own cache stay warm",
        f"- \"{KNOWN.lstrip(', ')}\": a data folder that has read these parents before, so that their content digests are known",
        "- Limit: the fastest way found to read all inputs and write the output (fsynced on disk) without merging, measured between"
        " the merges; memory: (bytes in + bytes out) / copy in memory",
    ]
    noisy, total = 0, 0
    for sample in (sample for entry in result["merges"] for sample in entry["samples"]):
        total += 1
        noisy += sample["others_cpu_s"] + sample["stolen_s"] > 0.2 * box["cores"] * sample["process_s"]
    if noisy:
        lines.append(f"- **Not an idle machine**: in {noisy} of {total} runs others (the kernel's writing counts) had more than a fifth of the CPU")
    rows, kept, missed, failed = list(rows_of(result)), 0, [], []
    for experts in dict.fromkeys(row["experts"] for row in rows):
        lines += ["", f"## Base and {experts} experts", "",
                  "| output/cache | method | ours s | CPU s | MB | mergekit s | CPU s | MB | mergekit / ours | limit s | ours / limit "
                  "| memory s | ours / memory | bars |",
                  "| --- | --- |" + " ---: |" * 11 + " --- |"]
        for row in (row for row in rows if row["experts"] == experts):
            mine, other = row["ours"], row["theirs"]
            megabytes = lambda side: shown(side["rss"] and side["rss"] / 1e6, 0)
            verdicts = [f"{text} {'ok' if good else '**missed**'}" for text, good in row["bars"]]
            where = f"{row['cell']} {row['method']}, {experts} experts"
            if row["failed"]:
                verdicts = ["**failed**"]
                failed.append(where)
            else:
                kept += sum(good for _, good in row["bars"])
                missed += [f"{where}: {text}" for text, good in row["bars"] if not good]
            cells = [row["cell"], row["method"], shown(mine["wall"]), shown(mine["cpu"]), megabytes(mine),
                     shown(other["wall"]), shown(other["cpu"]), megabytes(other), shown(row["faster"], 1, "x"),
                     shown(row["limit"], 3), shown(row["slower"], 2, "x"), shown(row["memory"], 3),
                     shown(mine["wall"] and mine["wall"] / row["memory"], 1, "x"), "; ".join(verdicts) or "-"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Bars kept: {kept}, missed: {len(missed)}; failed runs of ours: {len(failed)}."]
    lines += [f"- {text}" for text in missed] + [f"- {text}: failed" for text in failed]
    ways = dict.fromkeys(f"{row['cell']}, {row['read']} inputs: {row['way']}" for row in rows if row["way"])
    lines += ["", "The limits' fastest ways:"] + [f"- {text}" for text in ways] if ways else []
    return "\n".join(lines)


# ---- the whole ----

def parse(words):
    def listed(of):
        def read(text):
            found = [word.strip() for word in text.split(",") if word.strip()]
            if not found or any(word not in map(str, of) for word in found):
                raise argparse.ArgumentTypeError(f"some of {','.join(map(str, of))}")
            return [word for word in of if str(word) in found]
        return read

    def number(text):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([MB]?)", text)
        if not found:
            raise argparse.ArgumentTypeError("a number of parameters such as 1100M")
        return int(float(found[1]) * {"": 1, "M": 10**6, "B": 10**9}[found[2]])

    parser = argparse.ArgumentParser(prog="bench/merge.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=number, help="size of a checkpoint (1100M; quick: 20M)")
    parser.add_argument("--experts", type=listed([2, 3]), default=[2], metavar="2,3", help="experts beside the base (2)")
    parser.add_argument("--methods", type=listed(METHODS), default=METHODS, metavar="M,...", help=f"of {','.join(METHODS)}")
    parser.add_argument("--cells", type=listed(CELLS), metavar="C,...", help=f"of {','.join(CELLS)} (quick: the first and the last)")
    parser.add_argument("--repeats", type=int, help="runs of ours (2; quick: 1)")
    parser.add_argument("--mergekit-repeats", type=int, default=1, help="runs of mergekit (1); 0: only ours and the limits")
    parser.add_argument("--mergekit-flags", help="flags of mergekit-yaml besides the common ones; without: the fastest of a few, tried first")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which a merge is killed")
    parser.add_argument("--results", type=pathlib.Path, help="folder of the JSON (bench/results; quick: BENCH_DIR/results)")
    parser.add_argument("--quick", action="store_true", help="tiny checkpoints, one run each")
    parser.add_argument("--report", type=pathlib.Path, metavar="JSON", help="print the table of an earlier run")
    args = parser.parse_args(words)
    args.parameters = args.parameters or (20_000_000 if args.quick else 1_100_000_000)
    args.cells = args.cells or ([CELLS[0], CELLS[-1]] if args.quick else CELLS)
    args.repeats = args.repeats or (1 if args.quick else 2)
    return args


def measure(bench, args, result, save):
    cores = bench.cores
    size = max(64, min(1024, memory_of("MemAvailable") // 8 >> 20))
    bandwidth = lambda: bench.limits("copy", 64 if args.quick else size, cores, 5 if args.quick else 15)
    result["copy"] = bandwidth()
    result["bandwidth_bytes_per_second"] = max(rate["best"] for rate in result["copy"]["bytes_per_second"].values())
    configs = {n: write_configs(bench.folder / "configs", args.methods, n) for n in args.experts}
    result["configs"] = {str(n): {method: path.read_text() for method, path in paths.items()} for n, paths in configs.items()}
    flags = {output: f"{COMMON_FLAGS} {QUICK_FLAGS}" for output in bench.outputs}
    if args.mergekit_repeats:
        result["mergekit_startup"] = bench.startup()
        if args.mergekit_flags is not None:
            flags = {output: f"{COMMON_FLAGS} {args.mergekit_flags}" for output in bench.outputs}
        elif not args.quick:
            say("looking for mergekit's fastest flags")
            config = write_configs(bench.folder / "configs", ["linear"], 2)["linear"]
            result["mergekit_probe"] = probe = bench.probe_flags(config)
            for output in bench.outputs:
                tried = [sample for sample in probe if sample["output"] == output and "error" not in sample]
                if tried:
                    flags[output] = min(tried, key=lambda sample: sample["wall_s"])["flags"]
        result["mergekit_flags"] = flags
    save()
    for experts in args.experts:
        for cell in args.cells:
            for method in args.methods:
                if method == "slerp" and experts != 2:
                    continue
                names = inputs_of(method, experts)
                entry = {"experts": experts, "cell": cell, "group": method, "inputs": names, "samples": []}
                result["merges"].append(entry)
                result["limits"] += [{"experts": experts, "cell": cell, "inputs": names, **found} for found in bench.passes(cell, names)]
                variants = [method, GLOBAL_TIES] if method == "ties" else [method]
                for repeat in range(max(args.repeats, args.mergekit_repeats)):
                    if repeat < args.repeats:
                        for variant in variants:
                            for known in (False, True):
                                entry["samples"].append(bench.ours(variant, configs[experts][variant], cell, names, known))
                    if repeat < args.mergekit_repeats:
                        entry["samples"].append(bench.mergekit(method, configs[experts][method], cell, names, flags[cell.split("/")[0]]))
                save()
    result["copy_after"] = bandwidth()
    best = max(rate["best"] for rate in result["copy_after"]["bytes_per_second"].values())
    result["bandwidth_bytes_per_second"] = max(best, result["bandwidth_bytes_per_second"])
    result["seconds"] = time.time() - result["started"]
    save()


def main():
    args = parse(sys.argv[1:])
    if args.report:
        print(report(json.loads(args.report.read_text())))
        return
    folder = pathlib.Path(os.environ["BENCH_DIR"]).resolve()
    args.ours, args.mergekit = os.environ["OURS"], pathlib.Path(os.environ["MERGEKIT_ENV"]).resolve()
    if os.getloadavg()[0] > 0.5:
        say(f"warning: the load is {os.getloadavg()[0]:.1f}; times are only worth something on an idle machine")
    date = datetime.date.today().isoformat()
    bench = Bench(args, folder)
    bench.make_models()
    box = machine(folder)
    result = {
        "benchmark": "merge", "date": date, "started": time.time(), "quick": args.quick, "arguments": sys.argv[1:],
        "machine": box, "versions": versions(args), "ours": args.ours, "llama": bench.llama,
        "mergekit_flags": {}, "limits": [], "merges": [],
    }
    path = results_path(args.results or (folder / "results" if args.quick else ROOT / "bench" / "results"), box["cpu"], date)

    def save():
        path.write_text(json.dumps(result, indent=1, default=str) + "\n")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        bench.make_outputs()
        measure(bench, args, result, save)
    finally:
        bench.clean()
    print(report(result))
    say(f"every sample: {path}")
    sys.exit(1 if bench.failures else 0)


if __name__ == "__main__":
    main()
