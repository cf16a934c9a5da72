#!/usr/bin/env python3
"""Writes a tiny Llama-architecture GGUF for the tests: random weights, a vocabulary that works.

    make_tiny_gguf.py OUT [--seed N] [--weights f32|f16|bf16|q8_0|q4_0|q4_1]
                          [--pre smollm|gpt-2|llama-bpe] [--untied]

The same options give the same bytes. Two layers, width 64, 4 query and 2 KV heads of 16, ffn 128;
keys and names as in the files that real models come in. Only Python's standard library.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import random
import re
import struct

LAYERS, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 2, 64, 128, 4, 2, 16, 512
ALIGNMENT = 32
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # tokens 0, 1, 2
NUM_MERGES = 320
# Tokens that no sequence of merges makes: llama-bpe finds them all the same.
UNMERGED = ["\u0120quixotic", "zephyr", "\u0120\u00c3\u00a9tude"]

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What the merges are learned from: prose, code, numbers, accents, other scripts, space and lines.
TEXT = """
The lighthouse keeper's daughter counted the ships that passed each evening, and wrote their names
in a book: the Wren, the Harrier, the Old Intention. She'd seen them all before; they'll be back,
she said, when the wind is in the north and the herring are in the bay. "I've never been wrong,"
she told her father, "and I'm not going to begin today." Then the lamp was lit, and the night came
in over the water, and the keeper and his daughter sat and talked about the ships and the weather.

int main(void)
{
    for (int i = 0; i < 10; i++) {
        printf("%d %s\\n", i, names[i]);
        if (count[i] == 0) return 1;
    }
        return 0;
}

def total(values):
    return sum(value for value in values if value is not None)

In 1999 there were 365 days, 8760 hours and 525600 minutes; in 2000 there was one day more.
Le caf\u00e9 est tr\u00e8s bon, l'\u00e9t\u00e9 o\u00f9 les \u00e9l\u00e8ves \u00e9taient \u00e0 la for\u00eat. Stra\u00dfe, \u00fcber, sch\u00f6n, Gr\u00f6\u00dfe.
\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430? \u041f\u0440\u0438\u0432\u0435\u0442, \u0432\u0441\u0451 \u0445\u043e\u0440\u043e\u0448\u043e. \u4f60\u597d\uff0c\u4e16\u754c\u3002\u4f60\u597d\u3002 \u3053\u3093\u306b\u3061\u306f \U0001f600\U0001f600 \u2014 \u2026 \u00a0\u00a0
"""

# ---- vocabulary -------------------------------------------------------------------------------


def byte_alphabet():
    """The printable character that stands for each byte in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def learn_merges(text, count):
    """The most frequent neighbours, again and again; of equals the smaller pair."""
    alphabet = byte_alphabet()
    words = {}
    for piece in re.findall(r" ?[^\W\d_]+|\d| ?[^\s\w]+|\s+(?=\s)|\s+|_+", text):
        word = tuple(alphabet[b] for b in piece.encode())
        words[word] = words.get(word, 0) + 1
    merges = []
    while len(merges) < count:
        pairs = {}
        for word, times in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] = pairs.get(pair, 0) + times
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {merge_word(word, best): times for word, times in words.items()}
    return merges


def merge_word(word, pair):
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def vocabulary():
    """(tokens, token types, merges); every byte is a token."""
    merges = learn_merges(TEXT, NUM_MERGES)
    ordinary = list(byte_alphabet().values())
    for left, right in merges:
        if left + right not in ordinary:
            ordinary.append(left + right)
    ordinary += [token for token in UNMERGED if token not in ordinary]
    types = [3] * len(SPECIALS) + [1] * len(ordinary)  # control, normal
    return SPECIALS + ordinary, types, [f"{left} {right}" for left, right in merges]


# ---- weights: name -> (number of the type, of the file type, encoder of a row) -------------------


def f16_bytes(value):
    return struct.pack("<e", value)


def f16_round(value):
    return struct.unpack("<e", f16_bytes(value))[0]


def encode_f32(row):
    return struct.pack(f"<{len(row)}f", *row)


def encode_f16(row):
    return struct.pack(f"<{len(row)}e", *row)


def encode_bf16(row):
    words = struct.unpack(f"<{len(row)}I", encode_f32(row))
    return struct.pack(f"<{len(row)}H", *[(w + 0x7FFF + (w >> 16 & 1)) >> 16 for w in words])


def clamp(value, low, high):
    return max(low, min(high, round(value)))


def nibbles(quants):
    return bytes(quants[j] | quants[j + 16] << 4 for j in range(16))


def encode_q8_0(block):
    scale = f16_round(max(map(abs, block)) / 127) or 1.0
    return f16_bytes(scale) + struct.pack("<32b", *[clamp(x / scale, -127, 127) for x in block])


def encode_q4_0(block):
    scale = f16_round(max(block, key=abs) / -8) or 1.0
    return f16_bytes(scale) + nibbles([clamp(x / scale + 8, 0, 15) for x in block])


def encode_q4_1(block):
    low = f16_round(min(block))
    scale = f16_round((max(block) - min(block)) / 15) or 1.0
    quants = [clamp((x - low) / scale, 0, 15) for x in block]
    return f16_bytes(scale) + f16_bytes(low) + nibbles(quants)


def by_blocks(encode):
    return lambda row: b"".join(encode(row[i : i + 32]) for i in range(0, len(row), 32))


ENCODERS = {
    "f32": (0, 0, encode_f32),
    "f16": (1, 1, encode_f16),
    "bf16": (30, 32, encode_bf16),
    "q4_0": (2, 2, by_blocks(encode_q4_0)),
    "q4_1": (3, 3, by_blocks(encode_q4_1)),
    "q8_0": (8, 7, by_blocks(encode_q8_0)),
}


def tensors(num_tokens, weights, untied, seed):
    """(name, dims with the row length first, type, bytes) of each tensor."""
    rng = random.Random(seed)

    def matrix(name, row_len, rows):
        kind, _, encode = ENCODERS[weights]
        scale = (3.0 / row_len) ** 0.5  # keeps the variance of what it multiplies
        data = b"".join(
            encode([rng.uniform(-scale, scale) for _ in range(row_len)]) for _ in range(rows)
        )
        return name, (row_len, rows), kind, data

    def norm(name):
        return name, (WIDTH,), 0, encode_f32([rng.uniform(0.8, 1.2) for _ in range(WIDTH)])

    yield matrix("token_embd.weight", WIDTH, num_tokens)
    for layer in range(LAYERS):
        blk = f"blk.{layer}."
        yield norm(blk + "attn_norm.weight")
        yield matrix(blk + "attn_q.weight", WIDTH, HEADS * HEAD_DIM)
        yield matrix(blk + "attn_k.weight", WIDTH, KV_HEADS * HEAD_DIM)
        yield matrix(blk + "attn_v.weight", WIDTH, KV_HEADS * HEAD_DIM)
        yield matrix(blk + "attn_output.weight", HEADS * HEAD_DIM, WIDTH)
        yield norm(blk + "ffn_norm.weight")
        yield matrix(blk + "ffn_gate.weight", WIDTH, FFN)
        yield matrix(blk + "ffn_up.weight", WIDTH, FFN)
        yield matrix(blk + "ffn_down.weight", FFN, WIDTH)
    yield norm("output_norm.weight")
    if untied:
        yield matrix("output.weight", WIDTH, num_tokens)


# ---- the file ---------------------------------------------------------------------------------

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
SCALARS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind, data):
    return string(data) if kind == STRING else struct.pack(SCALARS[kind], data)


def key(name, kind, data):
    """A key and its value; a list becomes an array of that kind."""
    if isinstance(data, list):
        head = struct.pack("<IIQ", ARRAY, kind, len(data))
        return string(name) + head + b"".join(value(kind, item) for item in data)
    return string(name) + struct.pack("<I", kind) + value(kind, data)


def metadata(args, tokens, types, merges):
    llama = "llama."
    tok = "tokenizer.ggml."
    return [
        key("general.architecture", STRING, "llama"),
        key("general.type", STRING, "model"),
        key("general.name", STRING, "Tiny"),
        key("general.license", STRING, "apache-2.0"),
        key(llama + "block_count", U32, LAYERS),
        key(llama + "context_length", U32, CONTEXT),
        key(llama + "embedding_length", U32, WIDTH),
        key(llama + "feed_forward_length", U32, FFN),
        key(llama + "attention.head_count", U32, HEADS),
        key(llama + "attention.head_count_kv", U32, KV_HEADS),
        key(llama + "rope.freq_base", F32, 10000.0),
        key(llama + "attention.layer_norm_rms_epsilon", F32, 1e-5),
        key("general.file_type", U32, ENCODERS[args.weights][1]),
        key(llama + "vocab_size", U32, len(tokens)),
        key(llama + "rope.dimension_count", U32, HEAD_DIM),
        key(tok + "add_space_prefix", BOOL, False),
        key(tok + "add_bos_token", BOOL, args.pre == "llama-bpe"),
        key(tok + "model", STRING, "gpt2"),
        key(tok + "pre", STRING, args.pre),
        key(tok + "tokens", STRING, tokens),
        key(tok + "token_type", I32, types),
        key(tok + "merges", STRING, merges),
        key(tok + "bos_token_id", U32, 1),
        key(tok + "eos_token_id", U32, 2),
        key(tok + "unknown_token_id", U32, 0),
        key(tok + "padding_token_id", U32, 2),
        key("tokenizer.chat_template", STRING, CHAT_TEMPLATE),
        key("general.quantization_version", U32, 2),
    ]


def padded(data):
    return data + bytes(-len(data) % ALIGNMENT)


def gguf(args):
    tokens, types, merges = vocabulary()
    keys = metadata(args, tokens, types, merges)
    table, body = [], b""
    for name, dims, kind, data in tensors(len(tokens), args.weights, args.untied, args.seed):
        table.append(
            string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(body))
        )
        body += padded(data)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(table), len(keys))
    return padded(head + b"".join(keys) + b"".join(table)) + body


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--weights", choices=sorted(ENCODERS), default="f32")
    parser.add_argument("--pre", choices=["smollm", "gpt-2", "llama-bpe"], default="smollm")
    parser.add_argument("--untied", action="store_true", help="an output.weight of its own")
    args = parser.parse_args()
    with open(args.out, "wb") as file:
        file.write(gguf(args))


if __name__ == "__main__":
    main()
