"""Whole models, end to end, as compare.py times them: qkv-generate, llama.cpp and Transformers on
one GGUF in bf16 (make_model.py).

An engine is made of a model's path, prompts (lists of 512 token ids; Qkv: texts of as many tokens)
and threads. prefill() is the median number of seconds from a prompt to its next token,
decode(batch) that of a step, after the first 16 tokens of so many prompts. logits(): those after
the first prompt.

SPDX-License-Identifier: Apache-2.0
"""
import ctypes
import json
import os
import re
import statistics
import subprocess
import tempfile
import time

SHORT, STEPS = 16, 64  # tokens before decoding begins, and decoded


def timed(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


class Qkv:
    """examples/generate: a process a measurement; loading is not counted. texts: the prompts."""

    def __init__(self, program, model, texts, threads):
        self.command = [program, model, "--raw", "--ignore-eos", "--threads", str(threads)]
        self.texts = texts

    def run(self, *options, texts):
        words = [word for text in texts for word in ("-p", text)]
        return subprocess.run([*self.command, *map(str, options), *words], check=True,
                              encoding="utf-8", capture_output=True)

    def tokens(self):
        """Ids of each prompt, by the model's own tokenizer."""
        out = self.run("--tokenize", texts=self.texts).stdout
        return [[int(word) for word in line.split()] for line in out.splitlines()]

    def prefill(self):
        """Prompts one after the other: what lies between their first tokens."""
        done = self.run("-n", 1, "--json", "--max-batch", 1, "--chunk", 512, texts=self.texts[:5])
        ends = [json.loads(line)["ttft_ms"] for line in done.stdout.splitlines()]
        return statistics.median(b - a for a, b in zip(ends, ends[1:])) * 1e-3

    def decode(self, batch):
        done = self.run("-n", STEPS + 1, texts=[text[:SHORT] for text in self.texts[:batch]])
        return float(re.search(r"between tokens .*p50 ([\d.]+)", done.stderr).group(1)) * 1e-3

    def logits(self):
        import numpy as np

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "logits")
            self.run("--chunk", 512, "--logits", path, texts=self.texts[:1])
            return np.fromfile(path, "<f4").reshape(len(self.texts[0]), -1)[-1]


class LlamaCpp:
    """The C interface of llama.cpp, as its Python package exposes it."""

    def __init__(self, model, prompts, threads):
        import llama_cpp
        import numpy as np

        self.api, self.np, self.prompts = llama_cpp, np, prompts
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        path = model.encode()
        self.model = llama_cpp.llama_model_load_from_file(path,
                                                          llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = 2048, 8, True
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        self.ctx = llama_cpp.llama_init_from_model(self.model, options)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def step(self, rows):
        """rows: (token, position, sequence, is its output wanted). The likeliest next tokens."""
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        self.batch.n_tokens = len(rows)
        if self.api.llama_decode(self.ctx, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [int(self.row(i).argmax()) for i, row in enumerate(rows) if row[3]]

    def row(self, i):
        at = self.api.llama_get_logits_ith(self.ctx, i)
        return self.np.ctypeslib.as_array(at, shape=(self.vocab,))

    def prompt(self, tokens, sequence=0):
        return [(t, i, sequence, i == len(tokens) - 1) for i, t in enumerate(tokens)]

    def clear(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.ctx), True)

    def prefill(self):
        times = []
        for tokens in self.prompts[:5]:
            self.clear()
            times.append(timed(lambda rows=self.prompt(tokens): self.step(rows))[0])
        return statistics.median(times[1:])

    def decode(self, batch):
        self.clear()
        last = [self.step(self.prompt(self.prompts[s][:SHORT], s))[0] for s in range(batch)]
        times = []
        for i in range(STEPS):
            rows = [(token, SHORT + i, s, True) for s, token in enumerate(last)]
            seconds, last = timed(lambda rows=rows: self.step(rows))
            times.append(seconds)
        return statistics.median(times)

    def logits(self):
        self.clear()
        self.step(self.prompt(self.prompts[0]))
        return self.row(len(self.prompts[0]) - 1).copy()


class Transformers:
    """Hugging Face's model on torch, in bf16, attention by torch's SDPA."""

    def __init__(self, model, prompts, threads):
        os.environ["TQDM_DISABLE"] = "1"
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        folder, name = os.path.split(os.path.abspath(model))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.bfloat16).eval()
        self.torch, self.prompts = torch, prompts

    def step(self, tokens, cache=None):
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor(tokens), past_key_values=cache, use_cache=True,
                             logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def prefill(self):
        times = [timed(lambda p=p: self.step([p])[0].argmax(-1).tolist())[0]
                 for p in self.prompts[:5]]
        return statistics.median(times[1:])

    def decode(self, batch):
        logits, cache = self.step([p[:SHORT] for p in self.prompts[:batch]])
        times = []
        for _ in range(STEPS):
            last = logits.argmax(-1)[:, None].tolist()
            seconds, (logits, cache) = timed(lambda last=last, cache=cache: self.step(last, cache))
            times.append(seconds)
        return statistics.median(times)

    def logits(self):
        return self.step([self.prompts[0]])[0][0].float().numpy()
