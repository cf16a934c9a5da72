#!/usr/bin/env python3
"""Holds qkv-generate's tokens against Hugging Face's `tokenizers` on varied text.

    check_tokenizer.py PROGRAM MODEL [--seed N]

The reference is built from the vocabulary and the merges in MODEL, with the pre-tokeniser that the
file names. PROGRAM MODEL --tokenize --raw -f FILE [-f FILE ...] prints a line of ids per file.
Needs the packages numpy and tokenizers; reads Debian's bible-kjv-text if the `bible` program is
there.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from reference_llama import Gguf

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


PRE = {
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), byte_level(True)],
    "gpt-2": lambda: [byte_level(True)],
    "llama-bpe": lambda: [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level(False)],
}


def reference(metadata):
    """A function from text to ids."""
    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    tokens, pre = ggml["tokens"], ggml["pre"]
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in ggml["merges"]],
        ignore_merges=pre == "llama-bpe",
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE[pre]())
    special = [token for token, kind in zip(tokens, ggml["token_type"]) if kind in (3, 4)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    bos = [ggml["bos_token_id"]] if ggml.get("add_bos_token", pre == "llama-bpe") else []
    return lambda text: bos + tokenizer.encode(text, add_special_tokens=False).ids


# ---- texts ------------------------------------------------------------------------------------

# why -> text
WRITTEN = {
    "nothing": "",
    "one space": " ",
    "prose": "The quick brown fox jumps over the lazy dog. It wasn't there; they'd gone, he said.",
    "apostrophes": "I'm you're he's we've they'll I'd can't o'clock 'sup 'til rock 'n' roll ''s '' '",
    "apostrophes, capital": "I'M YOU'RE HE'S WE'VE THEY'LL I'D CAN'T 'S 'LL 'Re 'lL don'T \u2019s",
    "long s folds to s": "it'\u017f 'l\u017f '\u212a 'RE'\u017f",
    "digits": "0 1 12 123 1234 12345 3.14159 1,000,000 2024-02-29 v1.2.3 x86_64 0xdeadbeef 1e-05",
    "digits after spaces": "a  1   22    333 \n 4\n5\t6 \t 7  x  8",
    "digits of other kinds": "\u0663\u0664 \u0967\u0968\u0969 \u00b2\u00b3\u00bd \u2167 \u2460\u2461 \uff11\uff12\uff13 \u3007 \u4e00\u4e8c 5\u00b2x",
    "C": '#include <stdio.h>\n\nint main(void)\n{\n    printf("%d\\n", a[i]->b);\n\treturn 0;\n}\n',
    "Python": "def f(x: int) -> str:\n    '''doc'''\n    return {**x, 'a': [1, 2]}['a'] or f\"{x!r:>10}\"\n",
    "markup": '<a href="https://example.org/?q=1&r=%20">x</a> <!-- c --> {"k": [true, null]} $x^2_i$',
    "accents": "na\u00efve caf\u00e9 fa\u00e7ade \u00c5ngstr\u00f6m \u0141\u00f3d\u017a \u0130stanbul e\u0301 n\u0303 \u1ebf",
    "emoji": "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1f3\U0001f1f1 \u2764\ufe0f #\ufe0f\u20e3 \U0001f600\U0001f600x",
    "Cyrillic, Greek": "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0391\u03b8\u03ae\u03bd\u03b1 \u03ba\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1",
    "Arabic, Hebrew": "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0648\u064e\u0642\u064e\u0627\u0644",
    "Indic, Thai": "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0bb5\u0ba3\u0b95\u0bcd\u0b95\u0bae\u0bcd \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "Chinese, Japanese, Korean": "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f\u4e16\u754c \uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "spaces": "a b  c   d    e     f                  g   ",
    "lines": "a\nb\n\nc\n\n\nd\r\ne\r\n\r\nf\n \n  \n   g\n\n",
    "tabs and spaces": "\t\ta\t b \t c\n\t\n \t \n\t\td \v e \f f",
    "spaces of other kinds": "a\u00a0b\u00a0\u00a0c\u2003d\u3000e\u3000\u3000f\u2028g\u2029h\u0085i \u1680 \u180e j\u200bk\u202fl",
    "controls": "\x00\x01\x02 \x1b[0m \x7f a\x00b \u0080\u009f",
    "special tokens": "<|im_start|>user\nHi <|im_end|>\n<|endoftext|><|im_start|><|im_end| ><|im_end",
    "whole tokens": " quixotic zephyr \u00e9tude  quixotic quixotical zephyrs",
    "punctuation": "!!! ... ?!? --- *** ((([[[{{{}}}]]]))) \u00ab\u00bb \u201c\u201d \u2014\u2026 a.b,c;d:e/f\\g|h",
    "signs": "+ - * / = < > ^ ~ ` @ # $ % & \u20ac \u00a3 \u221e \u2211 \u2264 \u2192 \u00a9 \u2122 \u00b0 a\u2260b",
    "a long word": "supercalifragilisticexpialidocious" * 500,
    "one letter, many times": "a" * 30000,
    "many spaces": " " * 30000 + "x",
    "many lines": "\n" * 5000 + " " * 5000 + "\n" * 5000,
}


def assigned():
    """Characters of Unicode 3.2: later ones mean different things to different versions."""
    old = unicodedata.ucd_3_2_0
    chars = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    return [c for c in chars if old.category(c) == unicodedata.category(c) != "Cn"]


def random_texts(seed):
    rng = random.Random(seed)
    chars = assigned()
    bmp = [c for c in chars if ord(c) < 0x3000]
    ascii_chars = [chr(c) for c in range(128)]
    mixed = list(" \n\r\t'sStTlLdDmMvVeErR0123.,!(") + ["\u00e9", "\u4e2d", "\U0001f600", "\u0660", "\u00a0", "\u3000"]
    texts = {"every character": "".join(chars), "every character, spaced": " ".join(chars)}
    for why, alphabet, size in [
        ("random characters", chars, 100000),
        ("random characters of the first 12288", bmp, 100000),
        ("random ASCII", ascii_chars, 100000),
        ("random edges", mixed, 200000),
    ]:
        texts[why] = "".join(rng.choices(alphabet, k=size))
    return texts


def bible():
    if not shutil.which("bible"):
        return {}
    text = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True)
    return {"the Bible": text.stdout.decode()}


# ---- comparison -------------------------------------------------------------------------------


def run(program, model, texts):
    with tempfile.TemporaryDirectory() as folder:
        command = [program, model, "--tokenize", "--raw"]
        for i, text in enumerate(texts):
            path = pathlib.Path(folder, str(i))
            path.write_bytes(text.encode())
            command += ["-f", str(path)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [[int(word) for word in line.split()] for line in lines.split("\n")[:-1]]


def first_difference(tokens, want, got):
    at = next((i for i, (w, g) in enumerate(zip(want, got)) if w != g), min(len(want), len(got)))
    spell = lambda ids: [tokens[i] for i in ids[max(0, at - 3) : at + 5]]
    return f"token {at} of {len(want)}: expected ...{spell(want)}, got ...{spell(got)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("program")
    parser.add_argument("model")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    args = parser.parse_args()
    print(f"seed {args.seed}")
    metadata = Gguf(args.model).metadata
    encode = reference(metadata)
    texts = WRITTEN | random_texts(args.seed) | bible()
    answers = run(args.program, args.model, texts.values())
    if len(answers) != len(texts):
        sys.exit(f"{args.program}: expected {len(texts)} lines, got {len(answers)}")
    failed = total = 0
    for (why, text), got in zip(texts.items(), answers):
        want = encode(text)
        total += len(want)
        if got != want:
            failed += 1
            print(f"{why}: {first_difference(metadata['tokenizer.ggml.tokens'], want, got)}")
    print(f"{total} tokens compared")
    print(f"{len(texts) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
