#!/usr/bin/env python3
"""The qkv command line tool as its user sees it: help, info, verified benches, exit statuses.

usage: test_cli.py COMMAND ...     the tool, or an emulator, its options and the tool
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest

QKV = []  # the command
SMOKE = os.path.join(os.path.dirname(__file__), "../../bench/problems/smoke.txt")
TINY = ["gemm", "m=2,n=32,k=32,data=cache"]


def qkv(*arguments, **environment):
    """Runs the tool; returns its exit status, standard output and standard error."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("QKV_")}
    done = subprocess.run(QKV + list(arguments), env=dict(clean, **environment), timeout=600,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    return done.returncode, done.stdout, done.stderr


def usable_levels():
    return re.findall(r"^level +(\w+): usable$", qkv("info")[1], re.MULTILINE)


class Tool(unittest.TestCase):
    def succeeds(self, *arguments, **environment):
        status, out, err = qkv(*arguments, **environment)
        self.assertEqual((status, err), (0, ""), arguments)
        return out

    def bench(self, *arguments, **environment):
        out = self.succeeds("bench", "--json", "--seconds", "0", *arguments, **environment)
        return [json.loads(line) for line in out.splitlines()]

    def test_help_and_version(self):
        for arguments in (["--help"], ["info", "--help"], ["bench", "decode", "--help"]):
            out = self.succeeds(*arguments)
            for word in ("qkv info", "qkv bench", "decode", "kv_len", "--json", "QKV_DEVICE"):
                self.assertIn(word, out)
        self.assertRegex(self.succeeds("--version"), r"^qkv \d+\.\d+\.\d+\n$")

    def test_info_lists_levels_and_kernels(self):
        out = self.succeeds("info")
        self.assertRegex(out, r"(?m)^device +cpu:\w+, \d+ threads$")
        self.assertTrue(usable_levels())
        for op in ("attention", "gemm", "rmsnorm", "rope", "gated", "append", "argmax", "sampling",
                   "top_k", "log_probs", "verify"):
            self.assertRegex(out, r"(?m)^kernel +%s: %s\." % (op, op))

    def test_info_says_which_rows_take_a_problem(self):
        decode = "batch=8,kv_len=4096,heads=32/8,head_dim=128,page=16,q=bf16,kv=bf16"
        prefill = "batch=1,qo_len=2048,kv_len=2048,heads=32/8,head_dim=128,page=16,q=f32,kv=f32," \
                  "mask=causal"
        for op, text in (("decode", decode), ("prefill", prefill)):
            out = self.succeeds("info", op, text)
            for item in text.split(","):
                self.assertIn(item, out)
            self.assertRegex(out, r"(?m)^row +attention\.\w+: runs$")
            self.assertRegex(out, r"(?m)^row +attention\.d64: .*head_dim")
            self.assertRegex(out, r"(?m)^memory +plan \d+ bytes, scratch \d+ bytes$")

    def test_every_operator_is_verified_and_measured(self):
        with open(SMOKE) as f:
            lines = [line.split() for line in f if line.strip() and not line.startswith("#")]
        results = self.bench("--file", SMOKE)
        self.assertEqual([r["op"] for r in results], [words[0] for words in lines])
        operators = re.findall(r"^  (\w+) +\S.*\n {10,}\w+=", qkv("--help")[1], re.MULTILINE)
        self.assertGreater(len(operators), 5)
        self.assertEqual(set(operators), {r["op"] for r in results})
        for r, (_, text) in zip(results, lines):
            self.assertLessEqual(set(text.split(",")), set(r["problem"].split(",")))
            self.assertRegex(r["row"], r"^\w+\.\w+")
            for key in ("us", "us_best", "gbps", "ceiling", "share", "runs", "threads"):
                self.assertGreater(r[key], 0, key)
            self.assertLessEqual(r["us_best"], r["us"])
            rate = {"GB/s": "gbps", "GFLOP/s": "gflops"}[r["ceiling_unit"]]
            self.assertAlmostEqual(r["share"], r[rate] / r["ceiling"], delta=0.01 * r["share"])

    def test_a_printed_problem_is_the_same_problem(self):
        (first,) = self.bench(*TINY)
        (second,) = self.bench(first["op"], first["problem"])
        self.assertEqual(first["problem"], second["problem"])

    def test_a_verbose_line_pastes_back(self):
        for op, problem in (("decode", "batch=3,kv_len=50,dist=uniform,q=f32"),
                            ("prefill", "batch=2,qo_len=9,kv_len=50,mask=none,layout=HND,q=f16"),
                            ("mixed", "batch=3,prefills=1,qo_len=9,kv_len=50,window=20,cap=5")):
            problem += ",heads=4/2,head_dim=64/32,page=4,data=cache"
            done = qkv("bench", op, problem, "--seconds", "0", QKV_VERBOSE="run")
            line = next(x for x in done[2].splitlines() if x.startswith("qkv,run,"))
            _, _, name, row, text = line.split(",", 4)
            self.assertEqual((name, row), (op, "attention.any"))
            text = text[:text.index(",us=")] + ",data=cache"  # else gigabytes, to be of memory's speed
            (again,) = self.bench(name, text)
            self.assertLessEqual(set(text.split(",")), set(again["problem"].split(",")))

    def test_table_has_a_head_and_a_line_a_problem(self):
        lines = self.succeeds("bench", *TINY, "--seconds", "0").splitlines()
        self.assertEqual(len(lines), 3)
        self.assertRegex(lines[0], r"^# qkv .*cpu:\w+, \d+ threads")
        self.assertEqual(lines[1].split()[:5], ["op", "row", "us", "GB/s", "GFLOP/s"])
        self.assertRegex(lines[2], r"^gemm +gemm\.\w+ .*% .*m=2,n=32,k=32")

    def test_level_of_the_environment_makes_the_ceiling(self):
        levels = usable_levels()
        for level in levels:
            problem = "batch=1,qo_len=256,heads=4/4,head_dim=64,data=cache,q=f32"
            (r,) = self.bench("prefill", problem, "--threads", "1", QKV_DEVICE="cpu:" + level)
            self.assertEqual((r["device"], r["threads"]), ("cpu:" + level, 1))
            f32_level = {"avx512_bf16": "avx512", "amx": "avx512"}.get(level, level)
            self.assertEqual(r["ceiling_name"], "fma_" + f32_level)

    def test_host_figures_without_a_gpu(self):
        lines = self.succeeds("bench", "host", QKV_NVRTC="/nonexistent").splitlines()
        self.assertRegex(lines[0], r"^# qkv .*, cpu:\w+, kernels for sm_90a by no compiler$")
        figures = json.loads(self.succeeds("bench", "host", "--json", QKV_NVRTC="/nonexistent"))
        self.assertEqual((figures["op"], figures["compiler"]), ("host", ""))
        for key in ("open_ms", "plan_us", "plan_zipf_us"):
            self.assertGreater(figures[key], 0, key)
        for key in ("cold_decode_ms", "cached_decode_ms", "run_decode_us", "device_plan_us"):
            self.assertNotIn(key, figures)

    def test_compile_fills_a_cache_for_machines_without_nvrtc(self):
        with tempfile.TemporaryDirectory() as folder, \
                tempfile.NamedTemporaryFile("w", suffix=".txt") as f:
            f.write("rmsnorm tokens=3,size=256\nrmsnorm tokens=30,size=256\ngated tokens=2\n"
                    "append\nargmax batch=3\n")
            f.flush()
            arguments = ["compile", f.name, "--arch", "sm_80,sm_90a,sm_100a", "--cache", folder + "/new"]
            done = qkv(*arguments, QKV_NVRTC="/nonexistent")
            self.assertEqual(done[:2], (1, ""))
            self.assertIn("expected NVRTC", done[2])
            probe = ["compile", f.name, "--arch", "sm_80", "--cache", folder + "/probe"]
            if "expected NVRTC" in qkv(*probe)[2]:
                self.skipTest("no NVRTC on this machine")
            lines = self.succeeds(*arguments).splitlines()
            self.assertEqual([line.split()[0] for line in lines], ["sm_80", "sm_90a", "sm_100a"])
            compiled = 0
            for line in lines:
                self.assertRegex(line, r" 5 problems, [4-9] kernels compiled by nvrtc \d+\.\d+ in ")
                compiled += int(line.split(" problems, ")[1].split()[0])
            entries = sorted(os.listdir(folder + "/new"))
            self.assertEqual(len(entries), 2 * compiled)  # with the compiler's name and without
            for environment in ({}, {"QKV_NVRTC": "/nonexistent"}):
                again = self.succeeds(*arguments, **environment).splitlines()
                for line in again:
                    self.assertRegex(line, r" 5 problems, 0 kernels compiled")
            self.assertEqual(sorted(os.listdir(folder + "/new")), entries)

    def test_wrong_usage_is_named(self):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as f:
            f.write("# one fine line\ngemm m=2,n=8,k=8\ngemm m=2,n=zero\n")
            f.flush()
            cases = [
                ([], "expected a command"),
                (["benhc"], "benhc: expected info, bench or compile"),
                (["bench"], "expected OP [PROBLEM], or --file"),
                (["bench", "gemm", "--file", f.name], "expected OP [PROBLEM], or --file"),
                (["bench", "gem"], 'op: expected one of decode'),
                (["bench", "gemm", "m=0"], "m: expected a whole number from 1"),
                (["bench", "gemm", "m=2,kk=3"], "kk: not a key; gemm takes m, n, k"),
                (["bench", "decode", "heads=8/3"], "heads: expected"),
                (["bench", "decode", "q=f64"], "q: expected f32|f16|bf16"),
                (["bench", "gemm", "m=1", "n=1"], "n=1: expected at most"),
                (["bench", "gemm", "--jsn"], "--jsn: not an option"),
                (["bench", "gemm", "--seconds"], "--seconds: expected an argument"),
                (["bench", "gemm", "--seconds", "1s"], "--seconds: expected a number"),
                (["bench", "gemm", "--threads", "0"], "--threads: expected a number from 1"),
                (["bench", "gemm", "--ceilings"], "--ceilings belongs to info"),
                (["bench", "--file", "/nowhere/at/all"], "/nowhere/at/all: "),
                (["bench", "--file", os.devnull], "no problem in it"),
                (["bench", "--file", f.name], "line 3: n: expected a whole number"),
                (["bench", "gemm", "--device", "gpu"], "--device: expected cpu, cuda or cuda:N"),
                (["bench", "gemm", "--device", "cuda:x"], "--device cuda:: expected a number"),
                (["bench", "gemm", "--cache", "x"], "--arch and --cache belong to compile"),
                (["compile"], "compile: expected a file of problems"),
                (["compile", os.devnull], "no problem in it"),
                (["compile", SMOKE, "--arch", "sm_80,"], "--arch: expected names by commas"),
                (["info", "gemm"], "info: expected decode, prefill or mixed"),
                (["info", "--json"], "info: takes neither"),
            ]
            for arguments, message in cases:
                status, out, err = qkv(*arguments)
                self.assertEqual((status, out), (2, ""), arguments)
                self.assertTrue(err.startswith("qkv: ") and message in err, (arguments, err))

    def test_failed_calls_are_reported(self):
        cases = [
            (["bench", "decode", "head_dim=12"], {}, "head_dim"),
            (["bench", *TINY], {"QKV_DEVICE": "cpu:abacus"}, "abacus"),
            (["info"], {"QKV_DEVICE": "cpu:abacus"}, "abacus"),
            (["bench", "gemm", "m=16777216,n=16777216,k=16777216"], {}, "GB"),
        ]
        for arguments, environment, message in cases:
            status, out, err = qkv(*arguments, **environment)
            self.assertEqual((status, out), (1, ""), arguments)
            self.assertIn(message, err)


class Gpu(unittest.TestCase):
    """The same on a GPU, or on an emulated one: QKV_TEST_DEVICE=cuda."""

    environment = {k: os.environ[k] for k in ("QKV_NVRTC", "QKV_CACHE_DIR") if k in os.environ}

    def bench(self, *arguments, **environment):
        status, out, err = qkv("bench", "--device", "cuda", "--json", "--seconds", "0", *arguments,
                               **dict(self.environment, **environment))
        self.assertEqual(status, 0, err)
        return [json.loads(line) for line in out.splitlines()]

    def test_info_names_the_gpu(self):
        status, out, err = qkv("info", "--device", "cuda", **self.environment)
        self.assertEqual((status, err), (0, ""))
        self.assertRegex(out, r"(?m)^device +cuda:0:sm_\w+, \d+ threads$")
        self.assertRegex(out, r"(?m)^gpu +\S.*, \d+ multiprocessors, driver of CUDA \d+\.\d+$")
        self.assertRegex(out, r"(?m)^compiler +nvrtc \d+\.\d+$")
        status, out, err = qkv("info", "--device", "cuda:99", **self.environment)
        self.assertEqual((status, out), (1, ""))
        self.assertIn("device_id", err)

    def test_every_operator_is_verified(self):
        results = self.bench("--file", SMOKE)
        with open(SMOKE) as f:
            self.assertEqual([r["op"] for r in results],
                             [line.split()[0] for line in f if line[0].isalpha()])
        for r in results:
            self.assertTrue(r["device"].startswith("cuda:0:sm_"), r)
            for key in ("us", "us_best", "alone_us", "host_us", "runs"):
                self.assertGreater(r[key], 0, key)

    def test_a_filled_cache_serves_without_nvrtc(self):
        problem = ["rmsnorm", "tokens=3,size=64,data=cache"]
        with tempfile.TemporaryDirectory() as folder, \
                tempfile.NamedTemporaryFile("w", suffix=".txt") as f:
            f.write(" ".join(problem))
            f.flush()
            without = {"QKV_NVRTC": "/nonexistent", "QKV_CACHE_DIR": folder}
            arch = qkv("info", "--device", "cuda")[1].split("cuda:0:")[1].split(",")[0]
            status, _, err = qkv("bench", "--device", "cuda", *problem, **without)
            self.assertEqual(status, 1)
            self.assertIn("expected NVRTC", err)
            self.assertEqual(qkv("compile", f.name, "--arch", arch, "--cache", folder,
                                 **self.environment)[0], 0)
            self.assertEqual(len(self.bench(*problem, **without)), 1)


if __name__ == "__main__":
    QKV = sys.argv[1:]
    if not QKV:
        sys.exit(__doc__)
    unittest.main(argv=sys.argv[:1],
                  defaultTest="Gpu" if os.environ.get("QKV_TEST_DEVICE") == "cuda" else "Tool")
