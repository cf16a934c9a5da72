"""What the tests of qkv.flashinfer share: attention in float64, and a paged pool to take it from."""

import math

import numpy as np
import torch
from reference import attention, visible


TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float32: 2e-4}


def reference(
    q,
    k,
    v,
    causal=False,
    window_left=-1,
    sm_scale=None,
    logits_soft_cap=0.0,
    mask=None,
    sink=None,
    slopes=None,
    rope=None,
):
    """q [n, Hq, D], k [m, Hk, D], v [m, Hk, Dv]: o [n, Hq, Dv] and the base-2 lse [n, Hq]."""
    allowed = visible(q.shape[0], k.shape[0], window_left, 0 if causal and mask is None else -1)
    if mask is not None:
        allowed &= mask.cpu().bool()
    o, lse = attention(
        q, k, v, allowed=allowed, sm_scale=sm_scale, soft_cap=logits_soft_cap, rope=rope, slopes=slopes, sink=sink
    )
    return o, lse / math.log(2)


def close(got, expected, dtype=None):
    tolerance = TOLERANCE[dtype or (got.dtype if got.dtype in TOLERANCE else torch.float16)]
    torch.testing.assert_close(got.detach().cpu().double(), expected.cpu().double(), rtol=tolerance, atol=tolerance)


class Paged:
    """A pool with the keys and values of requests; whatever belongs to none is NaN."""

    def __init__(
        self, lens, page_size, heads, dim, dtype=torch.float16, layout="NHD", combined=True, device="cpu", dim_vo=None
    ):
        dim_vo = dim_vo or dim
        self.lens, self.page_size = lens, page_size
        pages = [-(-n // page_size) for n in lens]
        self.num_pages = sum(pages) + 3
        order = torch.randperm(self.num_pages)[: sum(pages)].tolist()
        self.k = [torch.randn(n, heads, dim).to(dtype) for n in lens]
        self.v = [torch.randn(n, heads, dim_vo).to(dtype) for n in lens]
        k = torch.full((self.num_pages, page_size, heads, dim), math.nan).to(dtype)
        v = torch.full((self.num_pages, page_size, heads, dim_vo), math.nan).to(dtype)
        self.tables, at = [], 0
        for r, n in enumerate(lens):
            self.tables.append(order[at : at + pages[r]])
            for t in range(n):
                page, slot = order[at + t // page_size], t % page_size
                k[page, slot], v[page, slot] = self.k[r][t], self.v[r][t]
            at += pages[r]
        if layout == "HND":
            k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        self.indptr = torch.tensor([0, *np.cumsum(pages)], dtype=torch.int32)
        self.indices = torch.tensor(order, dtype=torch.int32)
        self.last = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in lens]).int()
        self.cache = torch.stack([k, v], 1).to(device) if combined else (k.to(device), v.to(device))
        self.device = device

    @property
    def table(self):
        return self.indptr, self.indices, self.last

    def block_tables(self):
        """[requests, most pages] with rubbish beyond a request's pages."""
        width = max(map(len, self.tables), default=0) + 1
        rows = [t + [2**20] * (width - len(t)) for t in self.tables]
        lens = torch.tensor(self.lens, dtype=torch.int32, device=self.device)
        return torch.tensor(rows, dtype=torch.int32, device=self.device), lens


def workspace(device):
    return torch.empty(16, dtype=torch.uint8, device=device)


def queries(rows, heads, dim, dtype=torch.float16, device="cpu"):
    return torch.randn(rows, heads, dim).to(dtype).to(device)


def check(found, q, paged, qo_lens, dtype=None, masks=None, **options):
    """found = (o, lse) of the rows of each request."""
    o, lse = found
    at = 0
    assert o.shape[0] == sum(qo_lens)
    for r, n in enumerate(qo_lens):
        if masks is not None:
            options["mask"] = masks[r]
        expected = reference(q[at : at + n], paged.k[r], paged.v[r], **options)
        close(o[at : at + n], expected[0], dtype)
        close(lse[at : at + n], expected[1], dtype or torch.float16)
        at += n


def indptr(lens):
    return torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32)


def graph_buffers(batch, pages, device):
    """indptr, indices and last_page_len of a wrapper for graphs."""
    return [torch.zeros(n, dtype=torch.int32, device=device) for n in (batch + 1, pages, batch)]
