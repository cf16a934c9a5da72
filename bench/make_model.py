#!/usr/bin/env python3
"""Writes the 254M-parameter Llama that compare.py times: a GGUF in bf16 with random weights.

    make_model.py OUT [--seed N]

16 layers, width 1024, 16 query and 8 KV heads of 64, ffn 2816, 32000 tokens, embedding and head
untied. Every byte is a token and nothing merges but "th", so a text of n letters makes n tokens.
Needs the packages numpy and gguf (bench/requirements.txt).

SPDX-License-Identifier: Apache-2.0
"""
import argparse

import gguf
import numpy as np

LAYERS, WIDTH, FFN, VOCAB, CONTEXT = 16, 1024, 2816, 32000, 2048
HEADS, KV_HEADS, HEAD_DIM = 16, 8, 64
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_alphabet():
    """The printable character that stands for each byte in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]


def add_metadata(writer):
    tokens = SPECIALS + byte_alphabet() + ["th"]
    fill = [f"unused{i}" for i in range(VOCAB - len(tokens))]
    writer.add_name("Random Llama 254M")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + fill)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (VOCAB - len(SPECIALS)))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)


def add_tensors(writer, seed):
    random = np.random.default_rng(seed)

    def matrix(name, rows, row_len):
        limit = (3.0 / row_len) ** 0.5  # keeps the variance of what it multiplies
        values = random.uniform(-limit, limit, (rows, row_len)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, random.uniform(0.8, 1.2, WIDTH).astype(np.float32))

    matrix("token_embd.weight", VOCAB, WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        norm(block + "attn_norm.weight")
        matrix(block + "attn_q.weight", HEADS * HEAD_DIM, WIDTH)
        matrix(block + "attn_k.weight", KV_HEADS * HEAD_DIM, WIDTH)
        matrix(block + "attn_v.weight", KV_HEADS * HEAD_DIM, WIDTH)
        matrix(block + "attn_output.weight", WIDTH, HEADS * HEAD_DIM)
        norm(block + "ffn_norm.weight")
        matrix(block + "ffn_gate.weight", FFN, WIDTH)
        matrix(block + "ffn_up.weight", FFN, WIDTH)
        matrix(block + "ffn_down.weight", WIDTH, FFN)
    norm("output_norm.weight")
    matrix("output.weight", VOCAB, WIDTH)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    writer = gguf.GGUFWriter(args.out, "llama")
    add_metadata(writer)
    add_tensors(writer, args.seed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
