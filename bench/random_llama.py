"""Random Llama-shaped checkpoints in bfloat16, for benchmarks: a base and experts that are the base plus small noise.

    random_llama.py FOLDER PARAMETERS NAME...

Makes FOLDER/NAME/{config.json,model.safetensors} for every NAME that is not there yet; `base` must be there or among them.
The shapes are TinyLlama's (hidden 2048, 22 layers) at 1100M parameters and keep its proportions at other sizes. The same
size and name give the same bytes. Prints one line of JSON: the shapes, the bytes of a checkpoint. Needs numpy.
"""
import json
import os
import pathlib
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy

CHUNK = 4 << 20  # elements
WEIGHT, NOISE = 0.02, 0.001  # standard deviations; norms are around 1


def shapes_of(hidden):
    heads = hidden // 64
    kv_heads = max(n for n in range(1, max(1, heads // 8) + 1) if heads % n == 0)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": max(2, round(22 * hidden / 2048)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": round(5632 * hidden / 2048),
        "vocab_size": round(32000 * hidden / 2048),
    }


def tensors_of(shapes):
    hidden, inner, vocab = shapes["hidden_size"], shapes["intermediate_size"], shapes["vocab_size"]
    kv = hidden // shapes["num_attention_heads"] * shapes["num_key_value_heads"]
    tensors = {"lm_head.weight": (vocab, hidden), "model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(shapes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
        }
    tensors["model.norm.weight"] = (hidden,)
    return tensors


def elements(shape):
    return int(numpy.prod(shape, dtype=numpy.int64))


def closest(parameters):
    """The shapes whose number of parameters is closest to the one asked for, and that number."""
    sized = ((sum(map(elements, tensors_of(shapes_of(hidden)).values())), hidden) for hidden in range(64, 8192 + 64, 64))
    found, hidden = min(sized, key=lambda entry: abs(entry[0] - parameters))
    return shapes_of(hidden), found


def header_of(tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        size = 2 * elements(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


def to_bf16(values):
    """float32 to the bits of bfloat16, to nearest, ties to even. Finite values only."""
    bits = values.view(numpy.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(numpy.uint16)


def to_f32(bits):
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def config_of(shapes):
    return shapes | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write_checkpoint(folder, name, shapes):
    tensors = tensors_of(shapes)
    header, size = header_of(tensors)
    base = None if name == "base" else open(folder / "base" / "model.safetensors", "rb")
    draft = folder / f".{name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    with open(draft / "model.safetensors", "wb") as out:
        out.write(header)
        out.truncate(len(header) + size)
        out.flush()

        def fill(job):
            count, at, mean, stream = job
            noise = numpy.random.Generator(numpy.random.SFC64([zlib.crc32(name.encode()), stream]))
            values = noise.standard_normal(count, numpy.float32)
            if base is None:
                values *= WEIGHT
                values += mean
            else:
                values *= NOISE
                values += to_f32(numpy.frombuffer(os.pread(base.fileno(), 2 * count, len(header) + at), numpy.uint16))
            block = memoryview(to_bf16(values)).cast("B")
            while block:
                written = os.pwrite(out.fileno(), block, len(header) + at)
                block, at = block[written:], at + written

        jobs, at = [], 0
        for shape in tensors.values():
            count = elements(shape)
            for first in range(0, count, CHUNK):
                jobs.append((min(CHUNK, count - first), at + 2 * first, float(len(shape) == 1), len(jobs)))
            at += 2 * count
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, jobs))
        os.fsync(out.fileno())
    (draft / "config.json").write_text(json.dumps(config_of(shapes), indent=2) + "\n")
    if base is not None:
        base.close()
    # An interrupted run leaves nothing half-made under the final name.
    shutil.rmtree(folder / name, ignore_errors=True)
    draft.rename(folder / name)


def complete(folder, name, shapes):
    config, weights = folder / name / "config.json", folder / name / "model.safetensors"
    header, size = header_of(tensors_of(shapes))
    return (config.is_file() and weights.is_file() and weights.stat().st_size == len(header) + size
            and shapes.items() <= json.loads(config.read_text()).items())


def main():
    folder, parameters, names = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    shapes, found = closest(parameters)
    header, size = header_of(tensors_of(shapes))
    missing = [name for name in names if not complete(folder, name, shapes)]
    # Experts are made from the base; and one checkpoint's size stays free for the merges.
    needed = len(header) + size
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < (len(missing) + 2) * needed + (1 << 30):
        sys.exit(f"{folder}: {free / 1e9:.1f} GB free, {len(missing)} checkpoints of {needed / 1e9:.1f} GB to make; set BENCH_DIR")
    if "base" in missing:
        missing = ["base"] + [name for name in names if name != "base"]
    for name in missing:
        print(f"making {folder / name} ({found / 1e6:.0f}M parameters)", file=sys.stderr, flush=True)
        write_checkpoint(folder, name, shapes)
    print(json.dumps({"shapes": shapes, "parameters": found, "bytes": needed}))


if __name__ == "__main__":
    main()
