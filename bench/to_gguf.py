#!/usr/bin/env python3
"""A Llama checkpoint folder as a GGUF file for llama.cpp, for token ids only (no tokenizer): to_gguf.py FOLDER f32|bf16 FILE"""
import json
import pathlib
import sys

import gguf
import numpy as np

# Tensors of one layer: the folder's name, llama.cpp's name.
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def interleaved(rows, heads):
    """Rows of a query or key projection in the pair order that llama.cpp rotates."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def main():
    folder, precision, file = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    file_in = folder / "model.safetensors"
    header = read_header(file_in)

    def add(name, to, permute=None):
        bits = raw_bf16(file_in, header[f"{name}.weight"])
        wide = (bits.astype(np.uint32) << 16).view(np.float32)
        if permute:
            bits, wide = interleaved(bits, permute), interleaved(wide, permute)
        if precision == "bf16" and wide.ndim == 2:
            writer.add_tensor(f"{to}.weight", np.ascontiguousarray(bits).view(np.uint8),
                              raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(f"{to}.weight", np.ascontiguousarray(wide))

    add("model.embed_tokens", "token_embd")
    add("model.norm", "output_norm")
    if not config["tie_word_embeddings"]:
        add("lm_head", "output")
    for layer in range(config["num_hidden_layers"]):
        for name, to in LAYER.items():
            permute = {"attn_q": heads, "attn_k": kv_heads}.get(to)
            add(f"model.layers.{layer}.{name}", f"blk.{layer}.{to}", permute)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_header(file):
    with open(file, "rb") as f:
        return json.loads(f.read(int.from_bytes(f.read(8), "little")))


def raw_bf16(file, info):
    assert info["dtype"] == "BF16", info
    with open(file, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little") + info["data_offsets"][0]
    return np.fromfile(file, np.uint16, int(np.prod(info["shape"])), offset=start).reshape(info["shape"])


if __name__ == "__main__":
    main()
