"""Batches for BatchAttention: random requests in a pool of pages, what a plan of them says, and what they give
in float64.

SPDX-License-Identifier: Apache-2.0
"""

import math
import random
from types import SimpleNamespace

import numpy as np
import torch

import reference
from conftest import SEED

# Of o: storing it, and for 16 bits rounding probabilities for the tensor cores of a GPU.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make(seed=0, qo_lens=(1, 5, 2), kv_lens=(7, 5, 33), heads=(4, 2), dim=64, dim_vo=None,
         page_size=4, layout="NHD", dtype=torch.float32, device="cpu", **options):
    """A batch in a pool of pages whose unused slots are NaN, and what to expect of it."""
    g = torch.Generator().manual_seed(seed)
    case = SimpleNamespace(
        qo_lens=list(qo_lens), kv_lens=list(kv_lens), heads=heads, dim=dim, page_size=page_size,
        dim_vo=dim_vo or dim, layout=layout, dtype=dtype, device=device, causal=False, left=-1,
        right=-1, cap=0, alibi=None, sink=None, masks=None, rope=None, logit=None,
        sm_scale=dim**-0.5,
    )
    vars(case).update(options)
    hq, hk = heads
    pages = [-(-n // page_size) for n in kv_lens]
    pool = sum(pages) + 3
    order = torch.randperm(pool, generator=g).tolist()
    case.tables = []
    for n in pages:
        case.tables.append([order.pop() for _ in range(n)])
    case.packed = [page for table in case.tables for page in table]
    columns = max([*pages, 1]) + 1
    case.padded = [t + [1 << 30] * (columns - len(t)) for t in case.tables]  # unused: never read
    case.qo_offsets = np.cumsum([0, *qo_lens]).tolist()

    def cache(d):
        x = torch.full((pool, page_size, hk, d), math.nan, dtype=dtype)
        for table, n in zip(case.tables, kv_lens):
            for i, page in enumerate(table):
                used = min(page_size, n - i * page_size)
                x[page, :used] = torch.randn(used, hk, d, generator=g).to(dtype)
        return x

    k, v = cache(dim), cache(case.dim_vo)
    q = torch.randn(case.qo_offsets[-1], hq, dim, generator=g).to(dtype)
    o, lse = [], []
    for r, n in enumerate(kv_lens):
        rows = slice(case.qo_offsets[r], case.qo_offsets[r + 1])
        keys, values = (x[case.tables[r]].reshape(-1, hk, x.shape[-1])[:n] for x in (k, v))
        allowed = reference.visible(qo_lens[r], n, case.left, 0 if case.causal else case.right)
        if case.masks is not None:
            allowed &= case.masks[r]
        a, b = reference.attention(
            q[rows], keys, values, allowed=allowed, sm_scale=case.sm_scale, soft_cap=case.cap,
            rope=case.rope, slopes=case.alibi, logit=case.logit, sink=case.sink,
        )
        o.append(a)
        lse.append(b)
    case.o = torch.cat(o) if o else torch.zeros(0, hq, case.dim_vo).double()
    case.lse = torch.cat(lse) if lse else torch.zeros(0, hq).double()
    if layout == "HND":
        k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    case.q, case.k, case.v = (x.to(device) for x in (q, k, v))
    return case


def plan(attention, case, table="padded", convert=None, **options):
    convert = convert or (lambda x: x)
    tables = {"padded": case.padded, "packed": case.packed}[table]
    arguments = dict(causal=case.causal, window_left=case.left, window_right=case.right,
                     logits_soft_cap=case.cap, page_size=case.page_size)
    for name in ("alibi", "sink"):
        value = getattr(case, name)
        if value is not None:
            key = {"alibi": "alibi_slopes", "sink": "sink"}[name]
            arguments[key] = value.to(case.device)
    if case.masks is not None:
        arguments["custom_mask"] = case.masks
    if case.rope:
        arguments.update(pos_encoding="rope", rope_theta=case.rope[0], rope_scale=case.rope[1])
    if case.sm_scale != case.dim**-0.5:
        arguments["sm_scale"] = case.sm_scale
    arguments.update(options)
    attention.plan(convert(case.qo_offsets), convert(case.kv_lens), convert(tables), *case.heads,
                   case.dim, case.dim_vo, **arguments)


def check(case, o, lse, base_2=False):
    tolerance = TOLERANCE[case.dtype]
    assert o.dtype == case.dtype and o.shape == case.o.shape
    torch.testing.assert_close(o.double().cpu(), case.o, atol=tolerance, rtol=tolerance)
    want = case.lse / math.log(2) if base_2 else case.lse
    tolerance = max(tolerance / 10, 3e-5)
    torch.testing.assert_close(lse.double().cpu(), want, atol=tolerance, rtol=tolerance)


def as_torch(x):
    return torch.tensor(x, dtype=torch.int32)


def as_numpy(x):
    return np.array(x, np.int32)


def random_case(number, device):
    seed = SEED + number
    r = random.Random(seed)
    torch.manual_seed(seed)
    requests = r.choice([1, 2, 4, 7])
    qo_lens = [r.choice([0, 1, 1, 1, 3, 17, 70]) for _ in range(requests)]
    if r.random() < 0.3:
        qo_lens = [1] * requests
    kv_lens = [r.choice([0, 1, n, n + 1, r.randrange(200)]) for n in qo_lens]
    hk = r.choice([1, 2, 3])
    group = r.choice([1, 3, 4, 8])
    dim, dim_vo = r.choice([(64, 64), (128, 128), (32, 32), (80, 80), (192, 128), (24, 40)])
    options = {}
    if r.random() < 0.5:
        options["causal"] = True
    if r.random() < 0.3:
        options["left"] = r.choice([0, 1, 16, 100])
    if r.random() < 0.15:
        options["right"] = r.choice([0, 3])
    if r.random() < 0.25:
        options["cap"] = r.choice([1.5, 30.0])
    if r.random() < 0.25:
        options["alibi"] = torch.rand(hk * group) * 0.3
    if r.random() < 0.25:
        options["sink"] = torch.randn(hk * group)
    if r.random() < 0.25:
        options["rope"] = r.choice([(10000.0, 1.0), (500000.0, 2.0)])
    if r.random() < 0.2:
        options["sm_scale"] = r.choice([0.05, 0.3])
    if r.random() < 0.25:
        g = torch.Generator().manual_seed(seed)
        options["masks"] = [
            torch.rand(m, n, generator=g) < 0.6 for m, n in zip(qo_lens, kv_lens)
        ]
    return make(seed, qo_lens, kv_lens, (hk * group, hk), dim, dim_vo,
                page_size=r.choice([1, 5, 16]), layout=r.choice(["NHD", "HND"]),
                dtype=r.choice(list(TOLERANCE)), device=device, **options)
