"""Holds qkv-generate against the NumPy reference on any model: logits, tokens, perplexity.

  python3 tests/python/check_model.py --generate build/qkv-generate --model FILE
                                      [--device DEVICE] [--quick]

The bounds, all in f32:
  logits      N roundings (2^-24) of the largest logit, with N = 8 times what the reference itself
              loses when it runs in f32: how far rounding errors grow is the model's, and measured
  tokens      the reference's, or, at the first difference and everywhere after, one whose logit
              lies within 1e-4 of the best (the reference follows the tested tokens): "margin"
  batching    what shares the machine with a prompt changes no token: equal, no margin
  perplexity  in f32 three decimals (|difference| < 0.0005), past 10 as many digits; in bf16 0.5 %

Only Python 3 and NumPy. --quick takes fewer prompts and tokens, for the tiny model that CI makes.
The model must take 512 tokens of context. Prints a line per check; exit status 1 if one fails.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np

from reference_llama import Llama

MARGIN = 1e-4
EPS = 2.0**-24
TIMEOUT_S = 1800
PAGE_SIZE = 16

LONG = (
    "A lighthouse keeper wrote in his book every evening, whatever the weather. On the first of "
    "March he noted three ships, two from the north and one that he could not name. On the second "
    "there was fog and he noted nothing but the hour at which the lamp was lit. On the third the "
    "unknown ship came back, so close to the rocks that he rang the bell with his own hands until "
    "his palms were raw, and a voice answered him across the water in a language he had last heard "
    "as a child. He did not write that down. He wrote: wind from the west, sea moderate, one ship, "
    "safe. Years later his daughter read the book from the first page to the last, and what she"
)
PROMPTS = [
    "The",
    "The capital of France is",
    LONG,
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "Once upon a time, in a village by the sea, there lived",
    "1 2 3 4 5 6 7 8 9 10 11 12 13",
    "Zürich, Malmö und Kraków liegen",
    "Write a haiku about autumn 🍂 and the moon 🌕:\n",
    "Water boils at 100 degrees Celsius because",
    "#include <stdio.h>\n\nint main(void)\n{\n",
    "Q: What is 17 + 25?\nA:",
    "東京は日本の首都で、",
    "The three most important things to know about bread are",
    "SELECT name, COUNT(*) FROM orders",
    "Сегодня утром я вышел из дома и",
    "Dear Sir or Madam,\n\nI am writing to you about",
    "<html>\n<head>\n<title>",
    "In 1969, the first humans",
    "Ingredients:\n- 2 eggs\n- 200 g flour\n-",
    "To be, or not to be, that is",
]
SYSTEM = (
    "You are a patient teacher who answers in short, plain sentences and never uses a word that a "
    "child of ten would not know. Every answer ends with a question for the pupil.\n"
)
FAMILY = [  # one prefix: a whole prompt, a branch early and late, and the same twice
    SYSTEM,
    SYSTEM + "Pupil: Why is the sky blue?\nTeacher:",
    SYSTEM + "Pupil: Why is the sea salty?\nTeacher:",
    SYSTEM[:97] + " whale.",
    SYSTEM + "Pupil: Why is the sky blue?\nTeacher:",
]


class Mismatch(Exception):
    def __repr__(self):
        return str(self)


# What a wrong program can cause: besides a mismatch, a hang, or output of another form.
FAILURES = (Mismatch, subprocess.TimeoutExpired, ValueError, LookupError)


class Subject:
    """The program under test, a process per call; messages: the last one's standard error."""

    def __init__(self, program, model, device):
        self.command = [program, model, "--device", device]
        self.messages = ""

    def run(self, *options):
        done = subprocess.run([*self.command, *map(str, options)], capture_output=True,
                              encoding="utf-8", errors="replace", timeout=TIMEOUT_S)
        if done.returncode != 0:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            words = " ".join(map(str, options))[:200]
            raise Mismatch(f"exit status {done.returncode} with {words!r}: {last}")
        self.messages = done.stderr
        return done.stdout

    def count(self, pattern):
        """A number from the messages of the last run."""
        numbers = re.findall(pattern, self.messages)
        if len(numbers) != 1:
            raise Mismatch(f"expected one {pattern!r} on standard error, got {len(numbers)}")
        return int(numbers[0])

    def tokenize(self, *source):
        lines = self.run("--raw", "--tokenize", *source).splitlines()
        return [[int(word) for word in line.split()] for line in lines]

    def generate(self, prompts, num_tokens, *options):
        words = [word for prompt in prompts for word in ("-p", prompt)]
        out = self.run("--raw", "--json", "--dtype", "f32", "--temperature", 0, "--ignore-eos",
                       "-n", num_tokens, *options, *words)
        tokens = [json.loads(line)["tokens"] for line in out.splitlines()]
        lengths = [len(t) for t in tokens]
        if lengths != [num_tokens] * len(prompts):
            raise Mismatch(f"expected {len(prompts)} x {num_tokens} tokens, got {lengths}")
        return tokens

    def logits(self, prompt, path):
        self.run("--raw", "--dtype", "f32", "--logits", path, "-p", prompt)
        return np.fromfile(path, dtype="<f4")

    def perplexity(self, path, dtype, max_tokens):
        out = self.run("--raw", "--dtype", dtype, "--perplexity", "-f", path, "--max-tokens",
                       max_tokens)
        return json.loads(out)


class Reference:
    """The NumPy model, remembering what it has said."""

    def __init__(self, path, num_tokens):
        self.model = Llama(path, np.float64)
        self.model_f32 = Llama(path, np.float32)
        self.num_tokens = num_tokens
        self.known = {}

    def greedy(self, prompts):
        """prompts: lists of token ids."""
        new = [list(p) for p in {tuple(p) for p in prompts} - self.known.keys()]
        if new:
            self.known.update(zip(map(tuple, new), self.model.greedy(new, self.num_tokens)))
        return [self.known[tuple(p)] for p in prompts]

    def require_greedy(self, prompts, got):
        """Every token is the best, or within MARGIN of the best after the tokens before it."""
        close = 0
        for i, (prompt, want, tokens) in enumerate(zip(prompts, self.greedy(prompts), got)):
            if tokens == want:
                continue
            z = self.model.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
            gap = z.max(axis=1) - z[np.arange(len(tokens)), tokens]
            if gap.max() > MARGIN:
                at = int(np.argmax(gap > MARGIN))
                raise Mismatch(f"prompt {i}, token {at}: got {tokens[at]}, which is {gap[at]:.3g} "
                               f"below the best, {int(np.argmax(z[at]))}")
            close += 1
        # Where near-ties are the rule, the margin would excuse anything.
        if 2 * close > len(got):
            raise Mismatch(f"{close} of {len(got)} prompts needed the margin")
        rest = f", {close} within {MARGIN:g}" if close else ""
        return f"{len(got) - close} prompts identical{rest}"


def require_same(want, got):
    for i, (a, b) in enumerate(zip(want, got)):
        if a != b:
            at = next(j for j, (x, y) in enumerate(zip(a, b)) if x != y)
            raise Mismatch(f"prompt {i}, token {at}: expected {a[at]}, got {b[at]}")
    return f"{len(want)} prompts equal"


# ---- the checks: each returns what it found, or raises Mismatch --------------------------------


def check_logits(subject, reference, folder, prompt, ids):
    want = reference.model.logits(ids)
    got = subject.logits(prompt, os.path.join(folder, "logits.bin"))
    if got.size != want.size:
        raise Mismatch(f"expected {want.shape} logits, got {got.size} numbers")
    unit = EPS * np.abs(want).max()
    error = np.abs(got.reshape(want.shape) - want).max() / unit
    bound = 8 * np.abs(reference.model_f32.logits(ids) - want).max() / unit
    found = f"error {error:.1f} of {bound:.1f} roundings of {unit / EPS:.3g}, {len(ids)} tokens"
    if not error <= bound:  # so that NaN fails
        raise Mismatch(found)
    return found


def check_preempted(subject, prompts, num_tokens, want, options):
    found = require_same(want, subject.generate(prompts, num_tokens, *options))
    preemptions = subject.count(r"preemptions (\d+)")
    if preemptions == 0:
        raise Mismatch("no request was preempted")
    return f"{found}, {preemptions} preemptions"


def check_family(subject, reference, ids, options):
    found = reference.require_greedy(ids, subject.generate(FAMILY, reference.num_tokens, *options))
    shared = subject.count(r"shared +(\d+) prompt tokens")
    if (shared == 0) != ("--no-prefix-sharing" in options):
        raise Mismatch(f"{shared} prompt tokens shared")
    return f"{found}; {shared} prompt tokens shared"


def check_alone(subject, prompts, num_tokens, want):
    return require_same(want, [subject.generate([p], num_tokens)[0] for p in prompts])


def check_perplexity(subject, path, dtype, max_tokens, tokens, nll):
    got = subject.perplexity(path, dtype, max_tokens)
    want = float(np.exp(nll))
    found = f"{got['perplexity']:.5f}, reference {want:.5f}, over {got['tokens']} tokens"
    bound = 5e-4 * max(1, want / 10) if dtype == "f32" else 5e-3 * want
    same_nll = abs(np.exp(got["nll"]) - got["perplexity"]) < 1e-3 * want
    if got["tokens"] != len(tokens) or not same_nll or not abs(got["perplexity"] - want) < bound:
        raise Mismatch(found)
    return found


def sample_text(quick):
    """Text for the perplexity: Genesis 1-20, or with quick this file; None if there is no Bible."""
    if quick:
        with open(__file__, encoding="utf-8") as file:
            return file.read()
    if not shutil.which("bible"):
        return None
    verses = subprocess.run(["bible", "-f", "Gen1:1-Gen20:18"], capture_output=True, text=True,
                            check=True).stdout
    return "".join(verse.split(" ", 1)[1] + "\n" for verse in verses.splitlines())


def checks(subject, reference, quick, folder):
    """Yields (name, function) in order; a later check may use what an earlier one found."""
    num_tokens = reference.num_tokens
    prompts = PROMPTS[:6] if quick else PROMPTS
    words = [word for p in prompts + FAMILY for word in ("-p", p)]
    all_ids = subject.tokenize(*words)
    ids, family_ids = all_ids[: len(prompts)], all_ids[len(prompts) :]

    for name, i in (("one token", 0), ("a sentence", 1), ("a page", 2)):
        yield (f"logits of {name}",
               lambda i=i: check_logits(subject, reference, folder, prompts[i], ids[i]))

    # A pool for the longest prompt and little more: others are admitted, grow, and must give way.
    num_pages = max(-(-(len(p) + num_tokens) // PAGE_SIZE) for p in ids) + 2
    few_pages = ("--page-size", PAGE_SIZE, "--pages", num_pages)
    base = subject.generate(prompts, num_tokens)
    yield "greedy tokens", lambda: reference.require_greedy(ids, base)
    yield "alone", lambda: check_alone(subject, prompts, num_tokens, base)
    for name, order, options in (
        ("in reverse order", slice(None, None, -1), ()),
        ("every other prompt", slice(None, None, 2), ()),
        ("joining and leaving", slice(None), ("--max-batch", 3)),
        ("one thread", slice(None), ("--threads", 1)),
        ("three threads", slice(None), ("--threads", 3)),
    ):
        yield (name, lambda order=order, options=options: require_same(
            base[order], subject.generate(prompts[order], num_tokens, *options)))
    yield "few pages", lambda: check_preempted(subject, prompts, num_tokens, base, few_pages)

    for name, options in (
        ("chunks of 5", ("--chunk", 5)),
        ("chunks of 64", ("--chunk", 64)),
        ("pages of 1", ("--page-size", 1)),
        ("pages of 7", ("--page-size", 7)),
        ("pages of 128", ("--page-size", 128)),
    ):
        yield (name, lambda options=options: reference.require_greedy(
            ids, subject.generate(prompts, num_tokens, *options)))
    for name, options in (
        ("shared prefix", ()),
        ("shared prefix, one after the other", ("--max-batch", 1)),
        ("shared prefix, in pages of 5", ("--page-size", 5)),
        ("prefix not shared", ("--no-prefix-sharing",)),
    ):
        yield name, lambda options=options: check_family(subject, reference, family_ids, options)

    text = sample_text(quick)
    if text is None:
        print("skip perplexity: `bible` (Debian: bible-kjv) is not installed", flush=True)
        return
    path = os.path.join(folder, "text.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    max_tokens = 1100 if quick else 8192  # 1100: two windows and a short one
    tokens = subject.tokenize("-f", path)[0][:max_tokens]
    nll = reference.model_f32.nll(tokens)  # f32 for speed: f64 moves the perplexity by 1e-6
    for dtype in ("f32", "bf16"):
        yield (f"perplexity in {dtype}", lambda dtype=dtype: check_perplexity(
            subject, path, dtype, max_tokens, tokens, nll))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generate", required=True, help="the program qkv-generate")
    parser.add_argument("--model", required=True, help="a GGUF file of the Llama architecture")
    parser.add_argument("--device", default="cpu", help="as qkv-generate takes it")
    parser.add_argument("--quick", action="store_true", help="fewer prompts and tokens")
    args = parser.parse_args()
    if not os.access(args.generate, os.X_OK):
        parser.error(f"--generate: no such program: {args.generate}")
    reference = Reference(args.model, 24 if args.quick else 64)
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(args.generate, args.model, args.device)
        try:
            for name, check in checks(subject, reference, args.quick, folder):
                try:
                    print(f"ok   {name}: {check()}", flush=True)
                    passed += 1
                except FAILURES as failure:
                    print(f"FAIL {name}: {failure!r}", flush=True)
                    failed += 1
        except FAILURES as failure:  # what the remaining checks start from is missing
            print(f"FAIL before the next check: {failure!r}")
            failed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
