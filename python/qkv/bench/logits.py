"""The ends of a model: matrix products, and from logits to tokens.

SPDX-License-Identifier: Apache-2.0
"""

import torch
import torch.nn.functional as F

import qkv

from .measure import DTYPES, Candidate, Problem, flashinfer_candidate

# ---- GEMM ----------------------------------------------------------------------------------------


def gemm(bench):
    if bench.quick:
        shapes = [(3, 96, 64, "f32"), (16, 64, 96, "bf16")]
    elif bench.gpu:
        shapes = [(m, 4096, 4096, "bf16") for m in (1, 64, 4096)]
    else:
        shapes = [(m, 4096, 4096, dtype) for dtype in ("bf16", "f32") for m in (1, 16)]
        shapes += [(256, 2048, 2048, dtype) for dtype in ("bf16", "f32")]
    for m, n, k, dtype in shapes:
        yield gemm_problem(bench, m, n, k, dtype)


def gemm_problem(bench, m, n, k, dtype):
    set_bytes = n * k * DTYPES[dtype].itemsize
    sets = bench.num_sets(set_bytes)
    w, x = bench.filled((sets, n, k), dtype), bench.filled((m, k), dtype)
    out = bench.empty((m, n), dtype)
    few = slice(None, None, max(1, n // 64))  # columns that are checked
    candidates = [
        Candidate("qkv", lambda: lambda i: qkv.gemm(x, w[i], out=out, ctx=bench.ctx)),
        Candidate("torch", lambda: lambda i: F.linear(x, w[i])),
    ]
    moved = set_bytes + (m * k + m * n) * DTYPES[dtype].itemsize
    return Problem("gemm", f"{m} x {n} x {k}", {"dtype": dtype}, sets, set_bytes, candidates,
                   lambda got: [(got[:, few], x.double() @ w[0, few].double().T)],
                   bytes=moved if m <= 64 else 0, flops=2 * m * n * k if m > 64 else 0)


# ---- sampling ------------------------------------------------------------------------------------

TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9
# That many draws from one row of so few tokens: their shares are off by some 0.06 all together.
DRAWS, FEW, SHARE = 8192, 64, 0.12


def sampling(bench):
    if bench.quick:
        sizes = [(2, 1000)]
    else:
        sizes = [(n, 128256) for n in ((1, 64, 512) if bench.gpu else (1, 16))]
    for batch, vocab in sizes:
        yield argmax_problem(bench, batch, vocab)
        for filtered in (False, True):
            yield sample_problem(bench, batch, vocab, filtered)
    for filtered in (False, True):
        yield sample_problem(bench, DRAWS, FEW, filtered)


def logits_problem(bench, label, x, candidates, check):
    sets, batch, vocab = x.shape
    size = batch * vocab * x.dtype.itemsize
    return Problem("sampling", f"{label}, {batch} x {vocab}", {"dtype": "f32"}, sets, size, candidates,
                   check, bytes=size)


def argmax_problem(bench, batch, vocab):
    x = bench.filled((bench.num_sets(batch * vocab * 4), batch, vocab), "f32")
    out = torch.empty(batch, dtype=torch.int32, device=bench.device)

    def check(tokens):
        right = x[0].gather(1, tokens.long()[:, None])[:, 0] == x[0].amax(1)
        return None if right.all() else "a token is not the largest of its row"

    candidates = [
        Candidate("qkv", lambda: lambda i: qkv.argmax(x[i], out=out, ctx=bench.ctx)),
        Candidate("torch", lambda: lambda i: x[i].argmax(-1)),
    ]
    return logits_problem(bench, "argmax", x, candidates, check)


def kept_probabilities(row, filtered):
    """The distribution that is drawn from, float64 [.., vocab]; and the same a little wider."""
    p = (row.double() / TEMPERATURE).softmax(-1)
    if not filtered:
        return p, p
    p, order = p.sort(-1, descending=True)
    p[..., TOP_K:] = 0
    p /= p.sum(-1, keepdim=True)
    before = p.cumsum(-1) - p
    back = order.argsort(-1)
    exact, wider = (p.where(before < TOP_P + slack, 0).gather(-1, back) for slack in (0, 1e-5))
    return exact / exact.sum(-1, keepdim=True), wider


def sample_problem(bench, batch, vocab, filtered):
    """Rows of their own; or DRAWS times the same one, so that shares can be counted."""
    sets = bench.num_sets(batch * vocab * 4)
    rows = 1 if batch == DRAWS else batch
    x = bench.filled((sets, rows, vocab), "f32") * (1 if rows < batch else 3)  # none alone likely
    x = x.expand(sets, batch, vocab).contiguous()
    exact, wider = kept_probabilities(x[0, :rows], filtered)

    def check(tokens):
        tokens = tokens.flatten().long()
        if not (wider.expand(batch, vocab).gather(1, tokens[:, None]) > 0).all():
            return "a token is not among those that are kept"
        if rows < batch:
            shares = torch.bincount(tokens, minlength=vocab).double() / batch
            off = (shares - exact[0]).abs().sum().item()
            if off > SHARE:
                return f"shares of tokens are off by {off:.3f}, {SHARE} allowed"
        return None

    def of_all(value, dtype):
        return torch.full((batch,), value, dtype=dtype, device=bench.device)

    temperature = of_all(TEMPERATURE, torch.float32)
    top_k, top_p = of_all(TOP_K, torch.int32), of_all(TOP_P, torch.float32)

    def ours():
        seed = torch.arange(batch, dtype=torch.int64, device=bench.device)
        options = {"seed": seed, "temperature": temperature}
        options |= {"top_k": top_k, "top_p": top_p} if filtered else {}
        out = torch.empty(batch, dtype=torch.int32, device=bench.device)
        return lambda i: qkv.sample(x[i], **options, out=out, ctx=bench.ctx)

    def race(p):
        """A draw by an exponential race: what engines use in place of multinomial, which waits."""
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    def plain():
        if not filtered:
            return lambda i: race((x[i] / temperature[:, None]).softmax(-1))

        def run(i):
            largest, tokens = (x[i] / temperature[:, None]).topk(min(TOP_K, vocab))
            p = largest.softmax(-1)
            p = p.masked_fill(p.cumsum(-1) - p >= TOP_P, 0)
            return tokens.gather(1, race(p)[:, None])[:, 0]
        return run

    def flashinfer():
        from flashinfer import sampling as theirs

        if filtered:
            return lambda i: theirs.top_k_top_p_sampling_from_logits(x[i] / TEMPERATURE, top_k, top_p)
        return lambda i: theirs.sampling_from_logits(x[i] / TEMPERATURE)

    candidates = [Candidate("qkv", ours), Candidate("torch", plain),
                  *flashinfer_candidate(bench, flashinfer)]
    label = "top-k, top-p" if filtered else "sample"
    return logits_problem(bench, label, x, candidates, check)
