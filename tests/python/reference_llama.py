"""Llama in NumPy over a GGUF file: the independent answer that qkv-generate is held against.

Written for clearness: float64 by default, whole matrices, one sequence's attention at a time.
Only Python 3 and NumPy. Shapes: n new tokens, m keys, H query heads, G KV heads, D head dim.

SPDX-License-Identifier: Apache-2.0
"""
import struct

import numpy as np

# ---- GGUF: header, metadata, tensor table, then the aligned data (all little-endian) -----------

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i",
            6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Gguf:
    """metadata: name -> value; tensor(name) -> the weights as f32, in NumPy's order of axes."""

    def __init__(self, path):
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self._at = 0
        magic, version, num_tensors, num_metadata = self._unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path}: expected GGUF version 2 or 3, got {magic} {version}")
        self.metadata = {}
        for _ in range(num_metadata):
            name = self._string()
            self.metadata[name] = self._value(self._unpack("I")[0])
        self._tensors = {}
        for _ in range(num_tensors):
            name = self._string()
            dims = self._unpack(f"{self._unpack('I')[0]}Q")
            kind, offset = self._unpack("IQ")
            self._tensors[name] = (dims[::-1], kind, offset)  # the file has the fastest axis first
        alignment = self.metadata.get("general.alignment", 32)
        self._data = -(-self._at // alignment) * alignment

    def __contains__(self, name):
        return name in self._tensors

    def tensor(self, name):
        shape, kind, offset = self._tensors[name]
        if kind not in _DEQUANTISE:
            raise ValueError(f"{name}: tensor type {kind} is not one of {sorted(_DEQUANTISE)}")
        block_len, block, values = _DEQUANTISE[kind]
        begin = self._data + offset
        num_bytes = int(np.prod(shape)) // block_len * block.itemsize
        raw = self._bytes[begin : begin + num_bytes].view(block)
        return values(raw).astype(np.float32, copy=False).reshape(shape)

    def _unpack(self, fields):
        values = struct.unpack_from("<" + fields, self._bytes, self._at)
        self._at += struct.calcsize("<" + fields)
        return values

    def _string(self):
        (length,) = self._unpack("Q")
        self._at += length
        return self._bytes[self._at - length : self._at].tobytes().decode("utf-8", "replace")

    def _value(self, kind):
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, length = self._unpack("IQ")
            if kind in _SCALARS:
                return list(self._unpack(f"{length}{_SCALARS[kind]}"))
            return [self._value(kind) for _ in range(length)]
        return self._unpack(_SCALARS[kind])[0]


def _nibbles(block):
    """32 values of 4 bits: the low halves of the 16 bytes, then the high halves."""
    return np.concatenate([block["q"] & 15, block["q"] >> 4], axis=-1).astype(np.float32)


def _column(block, field):
    return block[field].astype(np.float32)[:, None]


# tensor type -> values per block, layout of a block, blocks -> values
_DEQUANTISE = {
    0: (1, np.dtype("<f4"), lambda b: b),
    1: (1, np.dtype("<f2"), lambda b: b),
    2: (32, np.dtype([("d", "<f2"), ("q", "u1", 16)]),  # Q4_0
        lambda b: _column(b, "d") * (_nibbles(b) - 8)),
    3: (32, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),  # Q4_1
        lambda b: _column(b, "d") * _nibbles(b) + _column(b, "m")),
    8: (32, np.dtype([("d", "<f2"), ("q", "i1", 32)]),  # Q8_0
        lambda b: _column(b, "d") * b["q"].astype(np.float32)),
    30: (1, np.dtype("<u2"), lambda b: (b.astype(np.uint32) << 16).view(np.float32)),  # BF16
}

# ---- the model ---------------------------------------------------------------------------------


class Sequence:
    """The KV cache of one sequence: per layer k and v, [G, length, D]."""

    def __init__(self, model):
        empty = np.zeros((model.num_kv_heads, 0, model.head_dim), model.dtype)
        self.kv = [(empty, empty)] * model.num_layers
        self.length = 0


class Llama:
    def __init__(self, path, dtype=np.float64):
        file = Gguf(path)
        architecture = file.metadata["general.architecture"]
        if architecture != "llama":
            raise ValueError(f"{path}: architecture is {architecture}, expected llama")

        def field(name, default=None):
            return file.metadata.get("llama." + name, default)

        def weight(name):
            return file.tensor(name).astype(dtype)

        self.dtype = np.dtype(dtype)
        self.num_layers = field("block_count")
        self.width = field("embedding_length")
        self.num_qo_heads = field("attention.head_count")
        self.num_kv_heads = field("attention.head_count_kv", self.num_qo_heads)
        self.head_dim = field("attention.key_length", self.width // self.num_qo_heads)
        self.eps = field("attention.layer_norm_rms_epsilon")
        scaling = field("rope.scaling.type", "none")
        if scaling != "none":
            raise ValueError(f"{path}: RoPE scaling {scaling} is not in this reference")

        # Llama-3.1 stores its frequency scaling as divisors, one per pair.
        rotary_dim = field("rope.dimension_count", self.head_dim)
        exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
        self.frequencies = float(field("rope.freq_base", 10000.0)) ** -exponents
        if "rope_freqs.weight" in file:
            self.frequencies = self.frequencies / file.tensor("rope_freqs.weight")

        self.embedding = weight("token_embd.weight")
        self.output = weight("output.weight") if "output.weight" in file else self.embedding
        self.output_norm = weight("output_norm.weight")
        parts = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down"
        self.layers = [{part: weight(f"blk.{i}.{part}.weight") for part in parts.split()}
                       for i in range(self.num_layers)]

    def hidden(self, batch):
        """Appends tokens to sequences; batch: (sequence, tokens) pairs. -> final [sum n, width].

        The rows of all sequences go through the matrices together; only attention is apart.
        """
        starts = np.cumsum([0] + [len(tokens) for _, tokens in batch])
        positions = np.concatenate([s.length + np.arange(len(tokens)) for s, tokens in batch])
        x = self.embedding[np.concatenate([np.asarray(tokens) for _, tokens in batch])]
        for i, w in enumerate(self.layers):
            h = self._norm(x, w["attn_norm"])
            q = self._rotate(self._heads(h @ w["attn_q"].T), positions)
            k = self._rotate(self._heads(h @ w["attn_k"].T), positions)
            v = self._heads(h @ w["attn_v"].T)
            o = np.empty((len(x), self.num_qo_heads * self.head_dim), self.dtype)
            for (sequence, _), begin, end in zip(batch, starts, starts[1:]):
                rows = slice(begin, end)
                old_k, old_v = sequence.kv[i]
                keys = np.concatenate([old_k, k[rows].transpose(1, 0, 2)], axis=1)
                values = np.concatenate([old_v, v[rows].transpose(1, 0, 2)], axis=1)
                sequence.kv[i] = (keys, values)
                o[rows] = self._attend(q[rows], keys, values)
            x = x + o @ w["attn_output"].T
            h = self._norm(x, w["ffn_norm"])
            gate = h @ w["ffn_gate"].T
            with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right limit, 0
                gate = gate / (1 + np.exp(-gate))
            x = x + (gate * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
        for sequence, tokens in batch:
            sequence.length += len(tokens)
        return self._norm(x, self.output_norm)

    def logits(self, tokens):
        """-> [n, vocab], row i from tokens[: i + 1]."""
        return self.hidden([(Sequence(self), tokens)]) @ self.output.T

    def greedy(self, prompts, num_tokens):
        """Continues each prompt by its best tokens, with a KV cache. -> lists of token ids."""
        sequences = [Sequence(self) for _ in prompts]
        results = [[] for _ in prompts]
        last = [list(prompt) for prompt in prompts]
        for _ in range(num_tokens):
            ends = np.cumsum([len(tokens) for tokens in last]) - 1
            x = self.hidden(list(zip(sequences, last)))[ends]
            best = np.argmax(x @ self.output.T, axis=1)
            last = [[int(token)] for token in best]
            for result, token in zip(results, last):
                result += token
        return results

    def nll(self, tokens, window=512):
        """Mean negative log-likelihood of tokens in windows, each alone from an empty cache.

        The first token of a window predicts, but is not predicted.
        """
        total, count = 0.0, 0
        for begin in range(0, len(tokens) - 1, window):
            chunk = np.asarray(tokens[begin : begin + window])
            if len(chunk) > 1:
                z = self.logits(chunk[:-1]).astype(np.float64)
                z -= z.max(axis=1, keepdims=True)
                hit = z[np.arange(len(z)), chunk[1:]]
                total += float(np.sum(np.log(np.sum(np.exp(z), axis=1)) - hit))
                count += len(z)
        return total / count

    def _heads(self, x):
        return x.reshape(len(x), -1, self.head_dim)

    def _norm(self, x, weight):
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.dtype.type(self.eps)) * weight

    def _rotate(self, x, positions):
        """RoPE over [n, heads, D]; GGUF's Llama weights have the pairs side by side: (2i, 2i+1)."""
        angles = (positions[:, None] * self.frequencies)[:, None, :]
        cos, sin = np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype)
        end = 2 * len(self.frequencies)  # the dims past the rotary ones stay as they are
        a, b = x[..., 0:end:2], x[..., 1:end:2]
        out = x.copy()
        out[..., 0:end:2], out[..., 1:end:2] = a * cos - b * sin, a * sin + b * cos
        return out

    def _attend(self, q, k, v):
        """Causal, of the last n positions. q [n, H, D], k and v [G, m, D] -> [n, H * D]."""
        n, m = len(q), k.shape[1]
        group = self.num_qo_heads // self.num_kv_heads
        q = q.transpose(1, 0, 2).reshape(self.num_kv_heads, group, n, self.head_dim)
        scores = q @ k[:, None].swapaxes(-1, -2) / self.dtype.type(self.head_dim**0.5)
        scores[..., np.arange(m) > np.arange(m - n, m)[:, None]] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        o = scores / scores.sum(axis=-1, keepdims=True) @ v[:, None]
        return o.reshape(self.num_qo_heads, n, self.head_dim).transpose(1, 0, 2).reshape(n, -1)
