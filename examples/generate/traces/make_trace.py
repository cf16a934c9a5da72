#!/usr/bin/env python3
"""Writes a trace for `qkv-generate --trace` (its form: ../trace.h) to standard output.

Arrivals are a Poisson process; lengths are lognormal, by median and sigma, cut to a range; a share of
the requests begin with one of a few prefixes (system prompts, say), the first the most often. The same
options give the same trace. Only Python's standard library.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import math
import random
import sys


def length(rng, median, sigma, most):
    return min(most, max(1, round(rng.lognormvariate(math.log(median), sigma))))


def requests(args):
    """Yields (arrival_ms, prompt_tokens, output_tokens, prefix), a prefix being (id, tokens) or None."""
    rng = random.Random(args.seed)
    prefixes = [(i, length(rng, args.prefix, 0.4, 2 * args.prefix)) for i in range(args.prefixes)]
    weights = [1 / (i + 1) for i in range(args.prefixes)]
    now = 0.0
    for _ in range(args.requests):
        prefix = None
        if prefixes and rng.random() < args.share:
            prefix = rng.choices(prefixes, weights)[0]
        prompt = length(rng, args.prompt, args.prompt_sigma, args.max_prompt)
        output = length(rng, args.output, args.output_sigma, args.max_output)
        yield now, prompt + (prefix[1] if prefix else 0), output, prefix
        now += rng.expovariate(args.rate) * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers")
    parser.add_argument("--requests", type=int, default=100, help="how many")
    parser.add_argument("--rate", type=float, default=4, help="requests per second")
    parser.add_argument("--prompt", type=int, default=160, help="median tokens of a user's own prompt")
    parser.add_argument("--prompt-sigma", type=float, default=0.9, help="of their logarithm")
    parser.add_argument("--max-prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--output", type=int, default=64, help="median tokens of an answer")
    parser.add_argument("--output-sigma", type=float, default=0.7, help="of their logarithm")
    parser.add_argument("--max-output", type=int, default=256, help="tokens")
    parser.add_argument("--prefixes", type=int, default=4, help="how many, 0 = none")
    parser.add_argument("--prefix", type=int, default=192, help="median tokens of a prefix")
    parser.add_argument("--share", type=float, default=0.6, help="of requests that have a prefix")
    args = parser.parse_args()
    print("# make_trace.py", *sys.argv[1:])
    print("# arrival_ms prompt_tokens output_tokens [prefix_id prefix_tokens]")
    for arrival, prompt, output, prefix in requests(args):
        print(f"{arrival:.1f} {prompt} {output}" + (" %d %d" % prefix if prefix else ""))


if __name__ == "__main__":
    main()
