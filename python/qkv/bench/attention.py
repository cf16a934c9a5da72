"""Attention: decode and prefill, paged and ragged, beside torch's SDPA, its varlen_attn and FlashInfer.

Those that know no pages get the same keys and values gathered into dense tensors beforehand.

SPDX-License-Identifier: Apache-2.0
"""

import contextlib
import functools
import inspect
import itertools
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from qkv.attention import Attention

from .measure import DTYPES, Candidate, Problem, flashinfer_candidate

PAGE = 16
SDPA = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION,
        "mem-efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
FLASHINFER_WORKSPACE = 128 << 20


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def indptr(lens):
    return i32([0, *itertools.accumulate(lens)])


class Requests:
    """Queries of some lengths over keys of some lengths, causal; q, k and v in several sets.

    q [sets][tokens, qo_heads, dim]; k, v [sets][pages, PAGE, kv_heads, dim], the pages of the requests
    in random order, or if ragged [sets][kv tokens, kv_heads, dim].
    """

    def __init__(self, bench, qo_lens, kv_lens, heads, dtype, paged):
        self.bench, self.paged, self.dtype = bench, paged, dtype
        self.qo_heads, self.kv_heads, self.dim = heads
        self.qo_lens, self.kv_lens = qo_lens, kv_lens
        self.qo_indptr, self.kv_indptr = indptr(qo_lens), indptr(kv_lens)
        num_pages = [-(-n // PAGE) for n in kv_lens]
        self.page_indptr = indptr(num_pages)
        self.page_indices = bench.pages(sum(num_pages))
        self.last_page_len = i32([n - (p - 1) * PAGE for n, p in zip(kv_lens, num_pages)])
        slots = (sum(num_pages), PAGE) if paged else (sum(kv_lens),)
        size = DTYPES[dtype].itemsize
        self.rows, keys = sum(qo_lens), sum(kv_lens)
        row_bytes = self.qo_heads * self.dim * size
        self.bytes = 2 * keys * self.kv_heads * self.dim * size + 2 * self.rows * row_bytes
        self.set_bytes = self.bytes - self.rows * row_bytes
        pairs = sum(n * m - n * (n - 1) // 2 for n, m in zip(qo_lens, kv_lens))
        self.flops = 4 * pairs * self.qo_heads * self.dim
        self.sets = bench.num_sets(self.set_bytes)
        self.k = bench.filled((self.sets, *slots, self.kv_heads, self.dim), dtype)
        self.v = bench.filled((self.sets, *slots, self.kv_heads, self.dim), dtype)
        self.q = bench.filled((self.sets, self.rows, self.qo_heads, self.dim), dtype)

    def of_request(self, i, r):
        """(q, k, v) of request r in set i, [length, heads, dim]."""
        rows = slice(self.qo_indptr[r], self.qo_indptr[r + 1])
        if not self.paged:
            keys = slice(self.kv_indptr[r], self.kv_indptr[r + 1])
            return self.q[i, rows], self.k[i, keys], self.v[i, keys]
        pages = self.page_indices[self.page_indptr[r] : self.page_indptr[r + 1]].long()
        pages = self.bench.on_device(pages)
        k, v = (x[i, pages].flatten(0, 1)[: self.kv_lens[r]] for x in (self.k, self.v))
        return self.q[i, rows], k, v

    @functools.cached_property
    def dense(self):
        """[sets][k or v][requests, kv_heads, longest, dim], what is beyond a request's end 0."""
        longest = max(self.kv_lens)
        shape = (self.sets, 2, len(self.kv_lens), self.kv_heads, longest, self.dim)
        out = self.bench.empty(shape, self.dtype).zero_()
        for i, r in itertools.product(range(self.sets), range(len(self.kv_lens))):
            for j, x in enumerate(self.of_request(i, r)[1:]):
                out[i, j, r, :, : self.kv_lens[r]] = x.transpose(0, 1)
        return out

    def check(self, result):
        """Up to 16 rows of the first and of the last request in float64."""
        got = torch.cat([x.reshape(-1, self.qo_heads, self.dim) for x in result]) \
            if isinstance(result, list) else result.reshape(-1, self.qo_heads, self.dim)
        for r in sorted({0, len(self.qo_lens) - 1}):
            q, k, v = self.of_request(0, r)
            n, m = self.qo_lens[r], self.kv_lens[r]
            rows = torch.linspace(0, n - 1, min(n, 16), device=q.device).long()
            hidden = torch.arange(m, device=q.device) > (rows + m - n)[:, None]
            group = self.qo_heads // self.kv_heads
            k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            logits = q[rows].double().transpose(0, 1) @ k.mT * self.dim**-0.5
            wanted = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v
            yield got[self.qo_indptr[r] + rows], wanted.transpose(0, 1)


# ---- those who compute it ------------------------------------------------------------------------


def qkv_candidate(rs):
    def make():
        op = Attention(num_qo_heads=rs.qo_heads, num_kv_heads=rs.kv_heads, head_dim_qk=rs.dim,
                       page_size=PAGE if rs.paged else 0, dtype_q=rs.dtype, mask="causal",
                       max_requests=len(rs.qo_lens), max_tokens=rs.rows,
                       max_qo_len=max(rs.qo_lens), max_kv_len=max(rs.kv_lens),
                       max_pages=len(rs.page_indices), ctx=rs.bench.ctx)
        if rs.paged:
            op.plan(qo_indptr=rs.qo_indptr, kv_indptr=rs.page_indptr, kv_indices=rs.page_indices,
                    kv_last_page_len=rs.last_page_len)
        else:
            op.plan(qo_indptr=rs.qo_indptr, kv_indptr=rs.kv_indptr)
        o = torch.empty_like(rs.q[0])
        return lambda i: op.run(rs.q[i], rs.k[i], rs.v[i], o=o)

    return Candidate("qkv", make)


@contextlib.contextmanager
def backend_only(backend):
    with warnings.catch_warnings(), sdpa_kernel(backend):
        warnings.simplefilter("ignore")  # a backend that refuses says so at length
        yield


def sdpa_candidates(rs, forms):
    """forms: {name: make}, each tried with every backend that the device may have; without math on a GPU,
    where it is nobody's choice and its logits may not fit."""
    names = ("flash", "mem-efficient", "cudnn") if rs.bench.gpu else ("math", "flash")
    return [Candidate(f"torch {name}", make, form, functools.partial(backend_only, SDPA[name]))
            for name in names for form, make in forms.items()]


def sdpa_decode(rs):
    """One row a request: with query heads as they are, or those of a KV head as rows of it."""
    batch, group = len(rs.kv_lens), rs.qo_heads // rs.kv_heads
    attend = F.scaled_dot_product_attention

    def mask():
        if len(set(rs.kv_lens)) == 1:
            return None
        keys = torch.arange(max(rs.kv_lens))
        visible = keys < i32(rs.kv_lens)[:, None]
        return rs.bench.on_device(visible[:, None, None])

    def gqa():
        kv, bits = rs.dense, mask()
        return lambda i: attend(rs.q[i][:, :, None], kv[i, 0], kv[i, 1], bits, enable_gqa=True)

    def folded():
        kv, bits = rs.dense, mask()
        q = rs.q.view(-1, batch, rs.kv_heads, group, rs.dim)
        return lambda i: attend(q[i], kv[i, 0], kv[i, 1], bits)

    return sdpa_candidates(rs, {"gqa": gqa, "folded": folded})


def sdpa_prefill(rs):
    """As many rows in each request, and as many keys; as many keys as rows, or fewer rows."""
    rows, keys, batch = rs.qo_lens[0], rs.kv_lens[0], len(rs.qo_lens)
    attend = F.scaled_dot_product_attention

    def tensors():
        """q, k, v [sets][batch, heads, rows or keys, dim]."""
        q = rs.q.view(rs.sets, batch, rows, rs.qo_heads, rs.dim).transpose(2, 3)
        if rs.paged:
            return q, rs.dense[:, 0], rs.dense[:, 1]
        return (q, *(x.view(rs.sets, batch, keys, rs.kv_heads, rs.dim).transpose(2, 3)
                     for x in (rs.k, rs.v)))

    def with_mask(bias):
        """bias() None: as many keys as rows, so that is_causal means the same."""
        def make():
            q, k, v = tensors()
            bits = bias()
            return lambda i: attend(q[i], k[i], v[i], bits, is_causal=bits is None,
                                    enable_gqa=True).transpose(1, 2)
        return make

    def repeated():
        """For those that want as many KV heads as query heads."""
        q, k, v = tensors()
        group = rs.qo_heads // rs.kv_heads

        def run(i):
            every = (x[i].repeat_interleave(group, 1) for x in (k, v))
            return attend(q[i], *every, is_causal=True).transpose(1, 2)

        return run

    if rows == keys:
        forms = {"gqa": with_mask(lambda: None)}
        return sdpa_candidates(rs, forms | {"repeated": repeated} if rs.bench.gpu else forms)

    def bits():
        at = torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]
        return rs.bench.on_device(at)

    forms = {"mask": with_mask(bits)}
    if rs.bench.gpu:
        from torch.nn.attention.bias import causal_lower_right

        forms["lower right"] = with_mask(lambda: causal_lower_right(rows, keys))
    return sdpa_candidates(rs, forms)


def sdpa_ragged(rs):
    """Requests of different lengths, as many keys as rows: one after the other."""
    attend = F.scaled_dot_product_attention

    def loop():
        requests = [[[x.transpose(0, 1)[None] for x in rs.of_request(i, r)]
                     for r in range(len(rs.qo_lens))] for i in range(rs.sets)]
        return lambda i: [attend(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
                          for q, k, v in requests[i]]

    return sdpa_candidates(rs, {"loop": loop})


def varlen_candidate(rs):
    """torch's attention over ragged tensors; what it takes differs from version to version."""

    def make():
        from torch.nn.attention.varlen import varlen_attn

        takes = inspect.signature(varlen_attn).parameters
        options = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        at_q, at_k = (rs.bench.on_device(x) for x in (rs.qo_indptr, rs.kv_indptr))
        longest = max(rs.qo_lens), max(rs.kv_lens)
        return lambda i: varlen_attn(rs.q[i], rs.k[i], rs.v[i], at_q, at_k, *longest, **options)

    return Candidate("torch varlen", make)


def flashinfer_decode(rs):
    def with_option(tensor_cores):
        def make():
            import flashinfer

            workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8,
                                    device=rs.bench.device)
            op = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD",
                                                               use_tensor_cores=tensor_cores)
            op.plan(rs.page_indptr, rs.bench.on_device(rs.page_indices), rs.last_page_len,
                    rs.qo_heads, rs.kv_heads, rs.dim, PAGE, q_data_type=rs.q.dtype,
                    kv_data_type=rs.k.dtype)
            return lambda i: op.run(rs.q[i], (rs.k[i], rs.v[i]))
        return make

    def xqa():
        from flashinfer.decode import xqa_batch_decode_with_kv_cache as attend

        workspace = torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=rs.bench.device)
        kv_lens = rs.bench.on_device(i32(rs.kv_lens)).view(torch.uint32)
        pages = rs.page_indices.split(rs.page_indptr.diff().tolist())
        table = rs.bench.on_device(pad_sequence(pages, batch_first=True))
        return lambda i: attend(rs.q[i], (rs.k[i], rs.v[i]), workspace, table, kv_lens,
                                max(rs.kv_lens), bmm1_scale=rs.dim**-0.5)

    return [*flashinfer_candidate(rs.bench, with_option(True), "tensor cores"),
            *flashinfer_candidate(rs.bench, with_option(False), "cuda cores"),
            *flashinfer_candidate(rs.bench, xqa, "xqa")]


def flashinfer_prefill(rs):
    def make():
        import flashinfer

        workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=rs.bench.device)
        dtypes = {"q_data_type": rs.q.dtype, "kv_data_type": rs.k.dtype}
        heads = (rs.qo_heads, rs.kv_heads, rs.dim)
        if rs.paged:
            op = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            op.plan(rs.qo_indptr, rs.page_indptr, rs.bench.on_device(rs.page_indices),
                    rs.last_page_len, *heads, PAGE, causal=True, **dtypes)
            return lambda i: op.run(rs.q[i], (rs.k[i], rs.v[i]))
        op = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        op.plan(rs.qo_indptr, rs.kv_indptr, *heads, causal=True, **dtypes)
        return lambda i: op.run(rs.q[i], rs.k[i], rs.v[i])

    return flashinfer_candidate(rs.bench, make)


# ---- problems ------------------------------------------------------------------------------------


def problem(family, label, rs, candidates, *, flops=0, bytes=0):
    params = {"dtype": rs.dtype, "qo_lens": rs.qo_lens, "kv_lens": rs.kv_lens, "qo_heads": rs.qo_heads,
              "kv_heads": rs.kv_heads, "head_dim": rs.dim, "page_size": PAGE if rs.paged else 0}
    return Problem(family, label, params, rs.sets, rs.set_bytes, [qkv_candidate(rs), *candidates],
                   rs.check, flops=flops, bytes=bytes)


def decode_problem(bench, label, kv_lens, heads, dtype):
    rs = Requests(bench, [1] * len(kv_lens), kv_lens, heads, dtype, paged=True)
    return problem("decode", label, rs, sdpa_decode(rs) + flashinfer_decode(rs), bytes=rs.bytes)


def decode(bench):
    """Rows of one token over paged keys."""
    heads = (8, 2, 64) if bench.quick else (32, 8, 128)
    small = "bf16" if bench.gpu else "f32"
    if bench.quick:
        shapes = [(2, 300, small)]
    elif bench.gpu:
        shapes = [(n, m, "bf16") for n, m in ((1, 8192), (16, 1024), (64, 1024), (64, 4096))]
    else:
        shapes = [(1, 4096, "bf16"), (8, 2048, "bf16"), (8, 2048, "f32")]
    for batch, kv_len, dtype in shapes:
        yield decode_problem(bench, f"{batch} x {kv_len}", [kv_len] * batch, heads, dtype)
    longest, batch = (512, 4) if bench.quick else (8192, 64) if bench.gpu else (4096, 8)
    lens = [max(1, longest // (r + 1)) for r in range(batch)]
    dtype = small if bench.quick else "bf16"
    yield decode_problem(bench, f"{batch}, {lens[-1]} to {longest}", lens, heads, dtype)


def prefill_problem(bench, label, qo_lens, kv_lens, heads, dtype, paged):
    rs = Requests(bench, qo_lens, kv_lens, heads, dtype, paged)
    mixed = len(set(qo_lens)) > 1
    peers = (sdpa_ragged(rs) if mixed else sdpa_prefill(rs)) + flashinfer_prefill(rs)
    if bench.gpu and not paged:
        peers.append(varlen_candidate(rs))
    return problem("prefill", label, rs, peers, flops=rs.flops)


def prefill(bench):
    """Causal rows of whole prompts, ragged and paged; and of chunks appended to what is cached."""
    if bench.quick:
        heads, ragged, mixed, paged = (8, 2, 64), [(1, 128)], [16, 70, 33], [(2, 40, 40), (2, 16, 90)]
        dtypes = ("bf16" if bench.gpu else "f32",)
    elif bench.gpu:
        heads, ragged = (32, 8, 128), [(16, 1024), (4, 4096), (1, 16384)]
        mixed = [4096 // (r + 1) for r in range(16)]
        paged = [*((batch, n, n) for batch, n in ragged), (8, 128, 8192)]
        dtypes = ("bf16",)
    else:
        heads, ragged, mixed = (32, 8, 128), [(1, 512)], [512, 256, 171, 128, 64]
        paged, dtypes = [(1, 512, 512), (2, 64, 1024)], ("f32", "bf16")
    for dtype in dtypes:
        for batch, n in ragged:
            lens = [n] * batch
            yield prefill_problem(bench, f"ragged {batch} x {n}", lens, lens, heads, dtype, False)
        label = f"ragged {len(mixed)}, {min(mixed)} to {max(mixed)}"
        yield prefill_problem(bench, label, mixed, mixed, heads, dtype, False)
        for batch, n, m in paged:
            label = f"paged {batch} x {n}" + (f" of {m}" if m > n else "")
            yield prefill_problem(bench, label, [n] * batch, [m] * batch, heads, dtype, True)
