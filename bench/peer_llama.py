#!/usr/bin/env python3
"""llama.cpp as a peer of bench/serve.py: peer_llama.py FILE THREADS reads one JSON task a line and answers each with one.

Through the batch interface of llama-cpp-python, all streams in one llama_decode a step and no HTTP: the best that the
library does. Its own server takes one request at a time.
"""
import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np

CONTEXT, BATCH = 32 * 1024, 512


class Model:
    def __init__(self, file, threads):
        llama_cpp.llama_backend_init()
        silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        self.silent = silent
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        assert self.model, file
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, BATCH, BATCH, 64
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32 if "f32" in file else llama_cpp.GGML_TYPE_F16
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 64)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def clear(self):
        llama_cpp.llama_memory_clear(self.memory, True)

    def decode(self, rows):
        """Runs (token, position, sequences, wanted) rows."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequences, wanted) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = token, position, len(sequences)
            for j, sequence in enumerate(sequences):
                self.batch.seq_id[i][j] = sequence
            self.batch.logits[i] = wanted
        assert llama_cpp.llama_decode(self.context, self.batch) == 0

    def logits(self, row):
        pointer = llama_cpp.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(pointer, (self.vocab,))

    def prefill(self, prompts, copies=1):
        """Runs the prompts; the first token of each. With copies all sequences share the one prompt."""
        rows = []
        for sequence, prompt in enumerate(prompts):
            own = list(range(copies)) if copies > 1 else [sequence]
            rows += [(token, i, own, i == len(prompt) - 1) for i, token in enumerate(prompt)]
        first = []
        for start in range(0, len(rows), BATCH):
            part = rows[start:start + BATCH]
            self.decode(part)
            first += [int(self.logits(i).argmax()) for i, row in enumerate(part) if row[3]]
        return first * copies if copies > 1 else first

    def generate(self, prompts, tokens, copies=1):
        self.clear()
        start = time.perf_counter()
        last = self.prefill(prompts, copies)
        lengths = [len(prompt) for prompt in prompts] * copies
        texts, times = [[token] for token in last], [time.perf_counter() - start]
        for step in range(tokens - 1):
            self.decode([(token, lengths[i] + step, [i], True) for i, token in enumerate(last)])
            last = [int(self.logits(i).argmax()) for i in range(len(last))]
            for text, token in zip(texts, last):
                text.append(token)
            times.append(time.perf_counter() - start)
        return {"seconds": times[-1], "first": times[0], "gaps": np.diff(times).tolist(), "tokens": texts}

    def prefill_only(self, prompts):
        self.clear()
        start = time.perf_counter()
        self.prefill(prompts)
        return {"seconds": time.perf_counter() - start}


def main():
    model = Model(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"ready": True, "version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(getattr(model, task.pop("do"))(**task)), flush=True)


if __name__ == "__main__":
    main()
