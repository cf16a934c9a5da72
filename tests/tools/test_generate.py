#!/usr/bin/env python3
"""qkv-generate as its user sees it, on a tiny model: traces, devices, exit statuses.

usage: test_generate.py PROGRAM MODEL [--device DEVICE]
With a device besides the CPU, what it generates is held against the CPU's.
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest

PROGRAM, MODEL, DEVICE = "", "", "cpu"
CHAT = os.path.join(os.path.dirname(__file__), "../../examples/generate/traces/chat.txt")
PROMPTS = ["The lighthouse keeper's daughter counted the ships that passed each evening, and wrote "
           "their names in a book", "int main(void)", "The", "In 1999 there were 365 days"]
SYSTEM = "Every answer ends with a question for the pupil, and none of them is longer than a line.\n"


def generate(*options):
    """Runs the program; returns its exit status, standard output and standard error."""
    done = subprocess.run([PROGRAM, MODEL, *map(str, options)], timeout=600, encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return done.returncode, done.stdout, done.stderr


class Program(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def succeeds(self, *options):
        status, out, err = generate(*options)
        self.assertEqual(status, 0, err)
        return out, err

    def fails(self, status, message, *options):
        got, out, err = generate(*options)
        self.assertEqual((got, out), (status, ""), err)
        self.assertEqual(len(err.splitlines()), 1, err)
        self.assertIn(message, err)

    def trace(self, text):
        path = os.path.join(self.folder.name, "trace.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def replay(self, text, *options):
        out, err = self.succeeds("--device", DEVICE, "--json", "--trace", self.trace(text),
                                 *options)
        self.assertEqual(len(out.splitlines()), 1)
        return json.loads(out), err


class Traces(Program):
    def test_errors_name_the_line(self):
        whole = "expected a whole number, 1 to "
        for text, message in (
            ("5 3\n", ':1: output_tokens: ' + whole + '16777216, got ""'),
            ("# two\n5 3 4\n4 1 1\n", ':3: arrival_ms: expected 5 to 1e+12, got "4"'),
            ("x 1 1\n", ':1: arrival_ms: expected 0 to 1e+12, got "x"'),
            ("nan 1 1\n", ':1: arrival_ms: expected 0 to 1e+12, got "nan"'),
            ("0 0 4\n", ':1: prompt_tokens: ' + whole + '16777216, got "0"'),
            ("0 1.5 4\n", ':1: prompt_tokens: ' + whole + '16777216, got "1.5"'),
            ("0 2 3 4\n", ':1: prefix_tokens: ' + whole + '2, got ""'),
            ("0 2 3 4 5\n", ':1: prefix_tokens: ' + whole + '2, got "5"'),
            ("0 8 3 4 5 6\n", ":1: expected 3 or 5 numbers, got more"),
            ("0 1 1\n0 500 14\n",
             ":2: expected at most the model's context of 512 tokens, got 513"),
            ("# nothing\n", ": expected requests, got none"),
        ):
            with self.subTest(text):
                self.fails(1, "trace.txt" + message, "--trace", self.trace(text))
        self.fails(1, "No such file", "--trace", os.path.join(self.folder.name, "none"))
        self.fails(2, "--trace: expected no prompts", "--trace", self.trace("0 1 1\n"), "-p", "a")
        self.fails(2, "--trace-speed: ", "--trace", self.trace("0 1 1\n"), "--trace-speed", "0")

    def test_counts_are_those_of_the_trace(self):
        text = "# a comment\n\n0 40 10 3 33\n\t0 70 1 # another\n60 50 12 3 40\n60.5 1 7\n240 100 3\n"
        found, err = self.replay(text)
        self.assertEqual((found["requests"], found["prompt_tokens"], found["output_tokens"]),
                         (5, 261, 33))
        self.assertEqual((found["shared_tokens"], found["preemptions"]), (32, 0))
        self.assertGreaterEqual(found["seconds"], 0.24)
        for name in ("ttft_ms", "tbt_ms"):
            ms = found[name]
            self.assertTrue(0 < ms["p50"] <= ms["p90"] <= ms["p99"] <= ms["max"], ms)
            self.assertTrue(ms["mean"] <= ms["max"], ms)
        self.assertRegex(err, r"(?m)^requests +5; tokens 261 in prompts, 33 generated$")
        self.assertRegex(err, r"(?m)^time to first token( +\d+\.\d\d){5}$")
        self.assertRegex(err, r"(?m)^time between tokens( +\d+\.\d\d){5}$")

    def test_speed_scales_arrivals_and_not_lengths(self):
        found, _ = self.replay("0 20 2\n60000 20 2\n", "--trace-speed", 1000)
        self.assertEqual((found["requests"], found["output_tokens"]), (2, 4))
        self.assertTrue(0.06 <= found["seconds"] < 30, found)

    def test_requests_give_way_where_pages_are_few(self):
        found, _ = self.replay("0 20 40\n" * 8, "--pages", 8, "--page-size", 16)
        self.assertEqual((found["requests"], found["output_tokens"]), (8, 320))
        self.assertGreater(found["preemptions"], 0)
        self.assertLessEqual(found["peak_pages"], 8)

    def test_the_trace_that_ships_is_one(self):
        with open(CHAT, encoding="utf-8") as file:
            lines = [line.split("#")[0].split() for line in file]
        self.assertEqual(len([line for line in lines if line]), 40)
        status, _, err = generate("--trace", CHAT)  # whose lengths the tiny model has no room for
        self.assertEqual(status, 1)
        self.assertRegex(err, r"chat\.txt:\d+: expected at most the model's context of 512 tokens")


class Devices(Program):
    def test_names_are_checked(self):
        for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cuda:99999999999", "cud"):
            self.fails(2, "--device: expected cpu, cuda or cuda:N", "-p", "a", "--device", name)

    def test_a_device_that_is_not_there_is_an_error(self):
        status, _, err = generate("-p", "a", "--device", "cuda:77")
        self.assertEqual(status, 1)
        self.assertRegex(err, "device: expected (NVIDIA's driver|a device_id below)")

    def same_as_the_cpu(self, *options):
        options = ("--raw", "--dtype", "f32", "--ignore-eos", *options)
        there, err = self.succeeds("--device", DEVICE, *options)
        self.assertEqual(there, self.succeeds("--device", "cpu", *options)[0])
        return err

    def test_the_text_is_the_cpus(self):
        words = [word for prompt in PROMPTS for word in ("-p", prompt)]
        self.same_as_the_cpu("-n", 12, *words)
        self.same_as_the_cpu("-n", 8, "--temperature", 0.9, "--top-p", 0.95, "--top-k", 50,
                             "--seed", 7, *words)

    def test_chunks_shared_pages_and_preemption_leave_the_text_as_it_is(self):
        words = [word for prompt in PROMPTS for word in ("-p", SYSTEM + prompt)]
        err = self.same_as_the_cpu("-n", 10, "--chunk", 34, *words)
        self.assertGreater(int(re.search(r"shared +(\d+) prompt", err)[1]), 0)
        words = ["-p", PROMPTS[1]] * 3
        err = self.same_as_the_cpu("-n", 12, "--page-size", 4, "--pages", 8, "--no-prefix-sharing",
                                   *words)
        self.assertGreater(int(re.search(r"preemptions (\d+)", err)[1]), 0)

    def test_perplexity_is_the_cpus(self):
        text = os.path.join(self.folder.name, "text.txt")
        with open(text, "w", encoding="utf-8") as file:
            file.write(" ".join(PROMPTS))
        for dtype, bound in (("f32", 1e-5), ("bf16", 2e-2)):
            nll = [json.loads(self.succeeds("--device", device, "--raw", "--dtype", dtype,
                                            "--perplexity", "-f", text)[0])["nll"]
                   for device in (DEVICE, "cpu")]
            self.assertLess(abs(nll[0] - nll[1]), bound)


if __name__ == "__main__":
    PROGRAM, MODEL = sys.argv[1:3]
    if sys.argv[3:4] == ["--device"]:
        DEVICE = sys.argv[4]
    unittest.main(argv=sys.argv[:1], verbosity=1)
