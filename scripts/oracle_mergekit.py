#!/usr/bin/env python3
"""mergekit 0.1.5 and the service on the same files: the bytes of average and linear merges.

    oracle_mergekit.py URL

Run with the packages of requirements-mergekit.txt; scripts/oracles.sh installs them and runs this. In float32 the result
must be equal, element for element; in bfloat16 it may differ by one unit in the last place, and where it does is printed.

torch's kernels for AVX2 and AVX-512 contract the multiplication and the addition of mergekit's `addcmul_` into one rounding,
its baseline kernels do not, so mergekit's own result depends on the machine. The service never contracts; the baseline is
what it is compared with. `--contracted` shows the difference that torch's choice makes (reported, not judged).
"""
import os
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors import safe_open  # noqa: E402

from service import MODELS, Service  # noqa: E402

OUT = pathlib.Path("target/oracle/mergekit-out")
CASES = {
    "average": [("math", 1.0), ("sentiment", 1.0)],
    "linear 0.7 / 0.3": [("math", 0.7), ("sentiment", 0.3)],
    "linear of three": [("base", 0.5), ("math", 1.0), ("sentiment", 0.25)],
}


def mergekit(parents, dtype, capability):
    config = {
        "merge_method": "linear",
        "dtype": dtype,
        "models": [{"model": str((MODELS / name).absolute()), "parameters": {"weight": weight}} for name, weight in parents],
    }
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    recipe = OUT / "config.yaml"
    recipe.write_text(yaml.safe_dump(config))
    tool = pathlib.Path(sys.executable).parent / "mergekit-yaml"
    subprocess.run([tool, recipe, OUT / "merged", "--quiet"], check=True,
                   stdout=subprocess.DEVNULL, env=os.environ | capability)
    return OUT / "merged"


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})
    return found


def ordered(tensor):
    """bfloat16 bits as integers in the order of the values, so that neighbours differ by 1."""
    bits = tensor.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -32768 - bits, bits)


def compare(ours, theirs, dtype):
    """Elements, how many differ, and the largest difference (ulp in bfloat16), with the tensor it is in."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    total, differing, worst, where = 0, 0, 0, "-"
    for name, a in ours.items():
        b = theirs[name]
        assert a.shape == b.shape and a.dtype == b.dtype, (name, a.shape, b.shape, a.dtype, b.dtype)
        difference = (ordered(a) - ordered(b)).abs() if dtype == "bfloat16" else (a - b).abs()
        total += a.numel()
        differing += int((difference != 0).sum())
        if difference.max().item() > worst:
            worst, where = difference.max().item(), name
    return total, differing, worst, where


def main():
    service = Service(sys.argv[1])
    contracted = "--contracted" in sys.argv
    capability = {} if contracted else {"ATEN_CPU_CAPABILITY": "default"}
    failed = False
    print(f"{'case':<20}{'dtype':<10}{'elements':>12}{'differ':>9}{'largest':>12}  where")
    for case, parents in CASES.items():
        for dtype in ("float32", "bfloat16"):
            recipe = {"method": "average", "dtype": dtype,
                      "models": [{"model": name, "weight": weight} for name, weight in parents]}
            folder, _ = service.merge(recipe)
            total, differing, worst, where = compare(tensors(folder), tensors(mergekit(parents, dtype, capability)), dtype)
            failed |= worst > (1 if dtype == "bfloat16" else 0)
            unit = " ulp" if dtype == "bfloat16" else ""
            print(f"{case:<20}{dtype:<10}{total:>12}{differing:>9}{worst:>8.3g}{unit:<4}  {where}")
    shutil.rmtree(OUT, ignore_errors=True)
    sys.exit(failed and not contracted)


if __name__ == "__main__":
    main()
