"""What lies between attentions: norms, RoPE, gated activations, appending to the KV cache.

SPDX-License-Identifier: Apache-2.0
"""

import torch
import torch.nn.functional as F

import qkv

from .attention import PAGE, i32, indptr
from .measure import DTYPES, Candidate, Problem, flashinfer_candidate

EPS = 1e-6


def shapes(bench, width):
    """(tokens, width, dtype) of the families that go over rows."""
    if bench.quick:
        return [(1, 64, "f32"), (33, 256, "bf16")]
    if bench.gpu:
        return [(n, width, "bf16") for n in (1, 64, 4096)]
    return [(1, width, "bf16"), (64, width, "bf16"), (1024, width, "bf16"), (1024, width, "f32")]


def float64_norm(x, weight):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


# ---- norms ---------------------------------------------------------------------------------------


def rmsnorm(bench):
    for tokens, width, dtype in shapes(bench, 4096):
        yield rmsnorm_problem(bench, tokens, width, dtype)


def rmsnorm_problem(bench, tokens, width, dtype):
    weight, out = bench.filled((width,), dtype), bench.empty((tokens, width), dtype)
    moved = 2 * tokens * width * out.itemsize
    sets = bench.num_sets(moved // 2)
    x = bench.filled((sets, tokens, width), dtype)

    def flashinfer():
        from flashinfer.norm import rmsnorm as theirs

        return lambda i: theirs(x[i], weight, EPS, out=out)

    candidates = [
        Candidate("qkv", lambda: lambda i: qkv.rmsnorm(x[i], weight, EPS, out=out, ctx=bench.ctx)),
        Candidate("torch", lambda: lambda i: F.rms_norm(x[i], (width,), weight, EPS)),
        *flashinfer_candidate(bench, flashinfer),
    ]
    return Problem("rmsnorm", f"{tokens} x {width}", {"dtype": dtype}, sets, moved // 2, candidates,
                   lambda got: [(got, float64_norm(x[0], weight))], bytes=moved)


def add_rmsnorm(bench):
    for tokens, width, dtype in shapes(bench, 4096):
        yield add_rmsnorm_problem(bench, tokens, width, dtype)


def add_rmsnorm_problem(bench, tokens, width, dtype):
    weight, out = bench.filled((width,), dtype), bench.empty((tokens, width), dtype)
    moved = 4 * tokens * width * out.itemsize
    sets = bench.num_sets(moved // 2)
    x, residual = (bench.filled((sets, tokens, width), dtype) for _ in range(2))
    kept = x[0].clone(), residual[0].clone()

    def reset():
        x[0], residual[0] = kept

    def plain():
        def run(i):
            residual[i] += x[i]
            return F.rms_norm(residual[i], (width,), weight, EPS), residual[i]
        return run

    def ours():
        def run(i):
            qkv.add_rmsnorm(x[i], residual[i], weight, EPS, out=out, ctx=bench.ctx)
            return out, residual[i]
        return run

    def flashinfer():
        from flashinfer.norm import fused_add_rmsnorm

        def run(i):
            fused_add_rmsnorm(x[i], residual[i], weight, EPS)
            return x[i], residual[i]
        return run

    def check(got):
        total = kept[0].double() + kept[1].double()
        return [(got[0], float64_norm(total, weight)), (got[1], total)]

    candidates = [Candidate("qkv", ours), Candidate("torch", plain),
                  *flashinfer_candidate(bench, flashinfer)]
    return Problem("add_rmsnorm", f"{tokens} x {width}", {"dtype": dtype}, sets, moved // 2,
                   candidates, check, bytes=moved, reset=reset)


# ---- RoPE ----------------------------------------------------------------------------------------


def rope(bench):
    heads = (4, 2, 32) if bench.quick else (32, 8, 128)
    for tokens, _, dtype in shapes(bench, 4096):
        yield rope_problem(bench, tokens, *heads, dtype)


def rope_problem(bench, tokens, qo_heads, kv_heads, dim, dtype):
    theta = 10000.0
    width = (qo_heads + kv_heads) * dim
    moved = 2 * tokens * width * DTYPES[dtype].itemsize
    sets = bench.num_sets(moved // 2)
    q = bench.filled((sets, tokens, qo_heads, dim), dtype)
    k = bench.filled((sets, tokens, kv_heads, dim), dtype)
    q_out, k_out = torch.empty_like(q[0]), torch.empty_like(k[0])
    positions = bench.on_device(torch.arange(tokens, dtype=torch.int32) * 3)
    freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = positions[:, None].double() * bench.on_device(freq)
    angles = torch.cat([angles, angles], -1)[:, None]  # [tokens, 1, dim]

    def rotated(x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def plain():
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)  # as models keep them
        return lambda i: (rotated(q[i], cos, sin), rotated(k[i], cos, sin))

    def flashinfer():
        from flashinfer.rope import apply_rope_pos_ids

        return lambda i: apply_rope_pos_ids(q[i], k[i], positions, rope_theta=theta)

    def check(got):
        cos, sin = angles.cos(), angles.sin()
        return [(x, rotated(y[0].double(), cos, sin)) for x, y in zip(got, (q, k))]

    candidates = [
        Candidate("qkv", lambda: lambda i: qkv.rope(q[i], k[i], positions=positions, theta=theta,
                                                    q_out=q_out, k_out=k_out, ctx=bench.ctx)),
        Candidate("torch", plain),
        *flashinfer_candidate(bench, flashinfer),
    ]
    return Problem("rope", f"{tokens}, {qo_heads}/{kv_heads} x {dim}", {"dtype": dtype}, sets,
                   moved // 2, candidates, check, bytes=moved)


# ---- gated activation ----------------------------------------------------------------------------


def activation(bench):
    for tokens, width, dtype in shapes(bench, 14336):
        yield activation_problem(bench, min(tokens, 1024) if not bench.gpu else tokens, width, dtype)


def activation_problem(bench, tokens, width, dtype):
    out = bench.empty((tokens, width), dtype)
    moved = 3 * tokens * width * out.itemsize
    sets = bench.num_sets(2 * moved // 3)
    both = bench.filled((sets, tokens, 2 * width), dtype)
    gate, up = both[..., :width], both[..., width:]

    def flashinfer():
        from flashinfer.activation import silu_and_mul

        return lambda i: silu_and_mul(both[i], out=out)

    candidates = [
        Candidate("qkv", lambda: lambda i: qkv.gated_activation(gate[i], up[i], "silu", out=out,
                                                                ctx=bench.ctx)),
        Candidate("torch", lambda: lambda i: F.silu(gate[i]) * up[i]),
        *flashinfer_candidate(bench, flashinfer),
    ]
    return Problem("activation", f"silu {tokens} x {width}", {"dtype": dtype}, sets, 2 * moved // 3,
                   candidates, lambda got: [(got, F.silu(gate[0].double()) * up[0].double())],
                   bytes=moved)


# ---- KV append -----------------------------------------------------------------------------------


def append(bench):
    """(requests, tokens of each, tokens already there)"""
    if bench.quick:
        cases, dtype, heads = [(3, 5, 30)], "f32", (2, 32)
    else:
        cases, dtype, heads = [(1, 1, 1024), (64, 1, 1024), (4, 256, 1024)], "bf16", (8, 128)
        cases += [(8, 512, 1024)] if bench.gpu else []
    for requests, new, old in cases:
        yield append_problem(bench, requests, new, old, *heads, dtype)


def append_problem(bench, requests, new, old, heads, dim, dtype):
    columns = -(-(old + new) // PAGE)
    pages = requests * columns
    table = bench.pages(pages).view(requests, columns)
    rows = requests * new
    k, v = (bench.filled((rows, heads, dim), dtype) for _ in range(2))
    pool_bytes = 2 * pages * PAGE * heads * dim * k.itemsize
    moved = 4 * rows * heads * dim * k.itemsize
    sets = bench.num_sets(pool_bytes)
    k_cache, v_cache = (bench.filled((sets, pages, PAGE, heads, dim), dtype) for _ in range(2))
    kept = k_cache[0].clone(), v_cache[0].clone()
    at = torch.arange(old, old + new)
    slots = (table[:, at // PAGE].long() * PAGE + at % PAGE).flatten()
    slots = bench.on_device(slots)
    starts = indptr([new] * requests)

    def reset():
        k_cache[0], v_cache[0] = kept

    def caches(i):
        return k_cache[i], v_cache[i]

    def by_table():
        index = {"qo_indptr": bench.on_device(starts), "block_table": bench.on_device(table),
                 "kv_lens": bench.on_device(i32([old + new] * requests))}

        def run(i):
            qkv.kv_append(k_cache[i], v_cache[i], k, v, **index, ctx=bench.ctx)
            return caches(i)
        return run

    def by_slots():
        def run(i):
            qkv.kv_append_slots(k_cache[i], v_cache[i], k, v, slots, ctx=bench.ctx)
            return caches(i)
        return run

    def index_copy():
        flat_k, flat_v = (x.view(sets, -1, heads, dim) for x in (k_cache, v_cache))

        def run(i):
            flat_k[i].index_copy_(0, slots, k)
            flat_v[i].index_copy_(0, slots, v)
            return caches(i)
        return run

    def flashinfer():
        from flashinfer.page import append_paged_kv_cache

        batch = bench.on_device(torch.arange(requests, dtype=torch.int32).repeat_interleave(new))
        where = bench.on_device(at.to(torch.int32).repeat(requests))
        indices = bench.on_device(table.flatten())
        offsets = bench.on_device(indptr([columns] * requests))
        last = bench.on_device(i32([old + new - (columns - 1) * PAGE] * requests))

        def run(i):
            append_paged_kv_cache(k, v, batch, where, caches(i), indices, offsets, last)
            return caches(i)
        return run

    def check(got):
        for x, before, new_rows in zip(got, kept, (k, v)):
            wanted = before.double()
            wanted.view(-1, heads, dim)[slots] = new_rows.double()
            yield x, wanted

    candidates = [Candidate("qkv", by_table, "block table"), Candidate("qkv", by_slots, "slots"),
                  Candidate("torch", index_copy), *flashinfer_candidate(bench, flashinfer)]
    return Problem("append", f"{requests} x {new}", {"dtype": dtype}, sets, pool_bytes, candidates,
                   check, bytes=moved, reset=reset)
