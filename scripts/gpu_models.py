#!/usr/bin/env python3
"""Large random checkpoints, made on a GPU in seconds: gpu_models.py FOLDER PARAMETERS NAME...

As bench/random_llama.py, with the same shapes, but other numbers: `base` first, the others are it plus small noise. Needs torch
with CUDA, and numpy."""
import json
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))
from random_llama import NOISE, WEIGHT, closest, config_of, header_of, tensors_of  # noqa: E402


def main():
    folder, parameters, names = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    shapes, found = closest(parameters)
    tensors = tensors_of(shapes)
    header, size = header_of(tensors)
    files = []
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config_of(shapes), indent=2) + "\n")
        files.append(open(folder / name / "model.safetensors", "wb"))
        files[-1].write(header)
    torch.manual_seed(7)
    # Each file is written by a thread of its own while the next tensor is made.
    with ThreadPoolExecutor(len(names)) as pool:
        writing = []
        for shape in tensors.values():
            base = torch.randn(shape, device="cuda") * WEIGHT + float(len(shape) == 1)
            made = [(base + (torch.randn(shape, device="cuda") * NOISE if k else 0)).bfloat16() for k in range(len(names))]
            blocks = [values.view(torch.uint8).flatten().cpu().numpy() for values in made]
            for done in writing:
                done.result()
            writing = [pool.submit(file.write, block) for file, block in zip(files, blocks)]
        for done in writing:
            done.result()
    for file in files:
        file.close()
    print(json.dumps({"shapes": shapes, "parameters": found, "bytes": len(header) + size}))


if __name__ == "__main__":
    main()
