"""What a call costs from Python, with tensors so small that nothing else counts; and the import.

On a GPU it is the time until the call returns, not that of the kernel.

SPDX-License-Identifier: Apache-2.0
"""

import functools
import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

import qkv
from qkv.attention import Attention, BatchAttention

from .measure import Candidate, Problem

AIM_US, AIM_IMPORT_US = 5.0, 100e3
CALLS = 200  # in a row; fewer than a GPU's queue holds
EPS = 1e-6


class LoopClock:
    """Seconds of a call as the mean of CALLS in a row, before any GPU has done them."""

    how = "loop"

    def __init__(self, call, _num_sets):
        self.call = call
        self.wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
        self.sample(0)

    def sample(self, seconds):
        took, end = [], time.perf_counter() + seconds
        call = self.call
        while len(took) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            for i in range(CALLS):
                call(i)
            took.append((time.perf_counter() - start) / CALLS)
            self.wait()
        return took


class OwnClock:
    """Of calls that return the seconds that count."""

    how = "process"

    def __init__(self, call, _num_sets):
        self.call = call

    def sample(self, _seconds):
        return [self.call(0)]


def overhead(bench):
    yield norm_problem(bench)
    yield attention_problem(bench)
    yield import_problem()


def small_problem(label, dtype, candidates, check, clock=LoopClock, aim_us=AIM_US):
    return Problem("overhead", label, {"dtype": dtype, "aim_us": aim_us}, 1, 0, candidates, check,
                   clock=clock)


def norm_problem(bench):
    dtype = "bf16" if bench.gpu else "f32"
    x, weight = bench.filled((1, 64), dtype), bench.filled((64,), dtype)
    out = torch.empty_like(x)
    wanted = x.double() * torch.rsqrt(x.double().square().mean() + EPS) * weight.double()

    def operator():
        from qkv import ops  # torch.ops.qkv, for torch.compile

        return lambda i: ops.rmsnorm(x, weight, EPS)

    candidates = [
        Candidate("qkv", lambda: lambda i: qkv.rmsnorm(x, weight, EPS, out=out), "out given"),
        Candidate("qkv", lambda: lambda i: qkv.rmsnorm(x, weight, EPS), "out made"),
        Candidate("qkv", operator, "torch operator"),
        Candidate("torch", lambda: lambda i: F.rms_norm(x, (64,), weight, EPS), "F.rms_norm"),
    ]
    return small_problem("rmsnorm 1 x 64", dtype, candidates, lambda got: [(got, wanted)])


def attention_problem(bench):
    """One row over one key, so that the result is the value."""
    dtype = "bf16" if bench.gpu else "f32"
    q, k, v = (bench.filled((1, 1, 64), dtype) for _ in range(3))
    o = torch.empty_like(q)

    @functools.cache
    def planned():
        op = Attention(num_qo_heads=1, num_kv_heads=1, head_dim_qk=64, dtype_q=dtype, max_requests=1,
                       max_tokens=1, max_kv_len=1, device=str(bench.device))
        op.plan(qo_indptr=[0, 1], kv_indptr=[0, 1])
        return op

    def given():
        run = planned().run
        return lambda i: run(q, k, v, o=o)

    def made():
        run = planned().run
        return lambda i: run(q, k, v)

    def operator():
        from qkv import ops

        handle = ops.handle(planned())
        return lambda i: ops.attention_run(handle, q, k, v)

    def batch():
        op = BatchAttention(device=str(bench.device))
        op.plan([0, 1], [1], None, 1, 1, 64, causal=True)
        return lambda i: op.run(q, (k, v), lse=False)[0]

    def sdpa():
        one = [x[None] for x in (q, k, v)]  # [batch, heads, 1, dim]
        return lambda i: F.scaled_dot_product_attention(*one)

    candidates = [Candidate("qkv", given, "Attention.run, o given"),
                  Candidate("qkv", made, "Attention.run, o made"),
                  Candidate("qkv", operator, "torch operator"),
                  Candidate("qkv", batch, "BatchAttention.run"), Candidate("torch", sdpa, "sdpa")]
    return small_problem("attention 1 x 1", dtype, candidates,
                         lambda got: [(got.reshape(1, 1, 64), v.double())])


def import_problem():
    """In a process of its own, which the first call has put into the system's file cache."""

    def of(package):
        def make():
            path = [os.path.dirname(os.path.dirname(qkv.__file__)), os.environ.get("PYTHONPATH", "")]
            environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in path if p))
            text = (f"import sys, time; start = time.perf_counter(); import {package}; "
                    "print(time.perf_counter() - start, 'torch' in sys.modules)")

            def run(_i):
                done = subprocess.run([sys.executable, "-c", text], env=environment, check=True,
                                      capture_output=True, text=True)
                seconds, with_torch = done.stdout.split()
                if with_torch == "True":
                    raise RuntimeError(f"import {package} imports torch")
                return float(seconds)
            return run
        return make

    candidates = [Candidate("qkv", of("qkv")), Candidate("numpy", of("numpy"))]
    return small_problem("import", "", candidates, lambda _: None, OwnClock, AIM_IMPORT_US)
