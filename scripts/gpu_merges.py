#!/usr/bin/env python3
"""Merges to disk through a GPU, beside the CPU: gpu_merges.py CAULDRON MODELS RECIPES [DEVICE] [NAME...]. MODELS has checkpoints
of bench/random_llama.py, RECIPES files of gpu_recipes.py (NAME: these only); results go to a folder in MODELS. DEVICE is that of
--device (cuda:0; on the CPU this shows that the script works).

Both must make the same files. Prints a table of the jobs' own times (reading, hashing, merging and writing; parents known), and
a line of JSON. The standard library."""
import json
import pathlib
import shutil
import sys
import tempfile
import time

from gpu_service import Started

# What the kernels do not compute is merged on the CPU.
ON_CPU = {"della"}


def made(service, data, recipe):
    """What a merge has written, and its milliseconds."""
    job = service.ask("POST", "/merge", recipe)
    while job["status"] in ("queued", "running"):
        time.sleep(0.01)
        job = service.ask("GET", f"/merge/{job['id']}")
    if job["status"] != "succeeded":
        raise SystemExit(f"{recipe}: {job['error']}")
    folder = pathlib.Path(data) / "checkpoints" / job["digest"]
    files = json.loads((folder / "manifest.json").read_text())["files"]
    service.ask("DELETE", f"/checkpoints/{job['digest']}")
    return files, job["timings"]["merge_ms"]


def merges_on_gpu(service):
    lines = [line for line in service.text("/metrics").splitlines() if line.startswith("cauldron_gpu_merges_total")]
    return sum(float(line.split()[-1]) for line in lines)


def main():
    program, models, recipes = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    device = sys.argv[4] if len(sys.argv) > 4 else "cuda:0"
    names = sys.argv[5:] or sorted(path.stem for path in recipes.glob("*.json"))
    rows, right = [], True
    print("| merge to disk | CPU | GPU | ratio | same files |")
    print("| --- | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory(dir=models) as data:
        one, other = f"{data}/cpu", f"{data}/gpu"
        with Started(program, models, one, "--device", "cpu") as cpu, \
                Started(program, models, other, "--device", device, "--merge-on", "gpu") as gpu:
            for name in names[:1] + names:
                recipe = json.loads((recipes / f"{name}.json").read_text())
                before = merges_on_gpu(gpu)
                # A base that no merge before it has read is read for its digest too.
                (files, on_cpu), (same, on_gpu) = made(cpu, one, recipe), made(gpu, other, recipe)
                is_on_gpu = merges_on_gpu(gpu) > before
                rows.append({"recipe": name, "cpu_ms": on_cpu, "gpu_ms": on_gpu, "same": files == same, "on_gpu": is_on_gpu})
                right &= files == same and (device == "cpu" or is_on_gpu or name in ON_CPU)
                print(f"| {name} | {on_cpu} ms | {on_gpu} ms | {on_cpu / max(on_gpu, 1):.2f} | {files == same} |")
        shutil.rmtree(data, ignore_errors=True)
        pathlib.Path(data).mkdir()
    # The first was there to read the parents.
    print(json.dumps({"merges": rows[1:], "right": right}))
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
