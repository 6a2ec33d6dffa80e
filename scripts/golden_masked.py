#!/usr/bin/env python3
"""What transformers' BertForMaskedLM expects in the place of words, for one tiny model.

    golden_masked.py FILE            writes it
    golden_masked.py FILE --check    computes it anew and compares

The weights come from the formula of golden_architectures.py, which the Rust test repeats.
"""
import json
import pathlib
import sys

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM

from golden_architectures import noise

WORDS = "the last movie was boring and nothing else a good film is it said very lovely rude plain one two review sentiment".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", ":", "##s", "##ing", "act"] + WORDS
TEXT = "Review: The last movies was BORING, acting and nothing else."
CONFIG = {"vocab_size": len(VOCABULARY), "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 40, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "max_position_embeddings": 32,
          "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0}
MOST = 12


def tokenizer():
    built = Tokenizer(models.WordPiece({token: i for i, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    built.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return built


def golden():
    model = BertForMaskedLM(BertConfig(**CONFIG, attn_implementation="eager")).eval()
    shapes, state = {}, {}
    for name, tensor in model.state_dict().items():
        if name == "cls.predictions.decoder.weight" or not tensor.is_floating_point():
            continue
        values = noise(name, tensor.numel()) + (1 if name.endswith("LayerNorm.weight") else 0)
        state[name] = torch.from_numpy(values.reshape(tuple(tensor.shape)).astype("float32"))
        shapes[name] = list(tensor.shape)
    # One parameter under two names.
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    shapes.pop("cls.predictions.decoder.bias", None)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    tokens = tokenizer()
    encoding = tokens.encode(TEXT)
    with torch.no_grad():
        logits = model(torch.tensor([encoding.ids])).logits[0]
    words = []
    for row, (token, (start, end)) in enumerate(zip(encoding.tokens, encoding.offsets)):
        if token.isalpha() and TEXT[start:end].isalpha() and not (row + 1 < len(encoding.tokens) and encoding.tokens[row + 1].startswith("##")):
            ranked = torch.sort(logits[row], descending=True, stable=True).indices[:MOST].tolist()
            expected = [VOCABULARY[i] for i in ranked if VOCABULARY[i].isalpha() and len(VOCABULARY[i]) > 1 and VOCABULARY[i] != token]
            words.append({"start": start, "end": end, "expected": expected})
    return {"config": {"architectures": ["BertForMaskedLM"], "model_type": "bert"} | CONFIG, "text": TEXT, "most": MOST,
            "tokenizer": json.loads(tokens.to_str()), "tensors": shapes, "words": words}


def main():
    file, found = pathlib.Path(sys.argv[1]), golden()
    if sys.argv[2:] == ["--check"]:
        kept = json.loads(file.read_text())
        assert kept["words"] == found["words"] and kept["tensors"] == found["tensors"], found["words"]
        print(f"masked: {len(found['words'])} words have the replacements that transformers expects")
        return
    file.write_text(json.dumps(found) + "\n")
    print(f"{file}: {len(found['words'])} words")


if __name__ == "__main__":
    main()
