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

TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.8, 50, 0.9, 0.05
FILTERS = {"sample": {}, "top-k, top-p": {"top_k": TOP_K, "top_p": TOP_P}, "top-p": {"top_p": TOP_P},
           "min-p": {"min_p": MIN_P}}
# That many draws from one row of so few tokens: their shares are off by some 0.06 all together.
DRAWS, FEW, SHARE = 8192, 64, 0.12


def sampling(bench):
    if bench.quick:
        sizes = [(2, 1000)]
    else:
        sizes = [(n, 128256) for n in ((1, 16, 64, 256, 512) if bench.gpu else (1, 16))]
    for batch, vocab in sizes:
        yield argmax_problem(bench, batch, vocab)
        yield top_k_problem(bench, batch, vocab)
        yield softmax_problem(bench, batch, vocab)
        for label in FILTERS:
            yield sample_problem(bench, label, batch, vocab)
    for label in FILTERS:
        yield sample_problem(bench, label, DRAWS, FEW)


def logits_problem(bench, label, x, candidates, check, passes=1):
    """passes: how often as many bytes as the logits have are moved."""
    sets, batch, vocab = x.shape
    size = batch * vocab * x.dtype.itemsize
    return Problem("sampling", f"{label}, {batch} x {vocab}", {"dtype": "f32"}, sets, size, candidates,
                   check, bytes=passes * size)


def logits(bench, batch, vocab):
    """[sets][batch, vocab]."""
    return bench.filled((bench.num_sets(batch * vocab * 4), batch, vocab), "f32")


def argmax_problem(bench, batch, vocab):
    x = logits(bench, batch, vocab)
    out = torch.empty(batch, dtype=torch.int32, device=bench.device)

    def check(tokens):
        right = x[0].gather(1, tokens.long()[:, None])[:, 0] == x[0].amax(1)
        return None if right.all() else "a token is not the largest of its row"

    candidates = [
        Candidate("qkv", lambda: lambda i: qkv.argmax(x[i], out=out, ctx=bench.ctx)),
        Candidate("torch", lambda: lambda i: x[i].argmax(-1)),
    ]
    return logits_problem(bench, "argmax", x, candidates, check)


def top_k_problem(bench, batch, vocab):
    """The TOP_K largest in any order."""
    x = logits(bench, batch, vocab)
    values = bench.empty((batch, TOP_K), "f32")
    tokens = torch.empty(batch, TOP_K, dtype=torch.int32, device=bench.device)

    def check(result):
        values, tokens = result
        if not torch.equal(x[0].gather(1, tokens.long()), values):
            return "a value is not that of its token"
        largest = x[0].sort(-1, descending=True)[0][:, :TOP_K]
        right = torch.equal(values.sort(-1, descending=True)[0], largest)
        return None if right else f"not the {TOP_K} largest"

    def flashinfer():
        from flashinfer import top_k

        return lambda i: top_k(x[i], TOP_K)

    candidates = [
        Candidate("qkv", lambda: lambda i: qkv.top_k(x[i], TOP_K, sorted=False, values=values,
                                                     indices=tokens, ctx=bench.ctx)),
        Candidate("torch", lambda: lambda i: x[i].topk(TOP_K, sorted=False)),
        *flashinfer_candidate(bench, flashinfer),
    ]
    return logits_problem(bench, f"top {TOP_K}", x, candidates, check)


def softmax_problem(bench, batch, vocab):
    x, out = logits(bench, batch, vocab), bench.empty((batch, vocab), "f32")

    def flashinfer():
        from flashinfer.sampling import softmax

        return lambda i: softmax(x[i], TEMPERATURE)

    candidates = [
        Candidate("qkv", lambda: lambda i: qkv.renormalize(x[i], temperature=TEMPERATURE, out=out,
                                                           ctx=bench.ctx)),
        Candidate("torch", lambda: lambda i: (x[i] / TEMPERATURE).softmax(-1)),
        *flashinfer_candidate(bench, flashinfer),
    ]
    return logits_problem(bench, "softmax", x, candidates,
                          lambda got: [(got, (x[0].double() / TEMPERATURE).softmax(-1))], passes=2)


def kept_probabilities(row, top_k=None, top_p=1.0, min_p=0.0):
    """The distribution that is drawn from, float64 [.., vocab]; and the same a little wider."""
    p, order = (row.double() / TEMPERATURE).softmax(-1).sort(-1, descending=True)
    p[..., top_k or p.shape[-1]:] = 0
    p /= p.sum(-1, keepdim=True)
    before = p.cumsum(-1) - p
    back = order.argsort(-1)
    exact, wider = (
        p.where((before < top_p + slack) & (p >= min_p * (1 - slack) * p[..., :1]), 0).gather(-1, back)
        for slack in (0, 1e-5))
    return exact / exact.sum(-1, keepdim=True), wider


def sample_problem(bench, label, batch, vocab):
    """Rows of their own; or DRAWS times the same one, so that shares can be counted."""
    filters = FILTERS[label]
    rows = 1 if batch == DRAWS else batch
    sets = bench.num_sets(batch * vocab * 4)
    x = bench.filled((sets, rows, vocab), "f32") * (1 if rows < batch else 3)  # none alone likely
    x = x.expand(sets, batch, vocab).contiguous()
    exact, wider = kept_probabilities(x[0, :rows], **filters)

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

    def of_all(value):
        dtype = torch.int32 if isinstance(value, int) else torch.float32
        return torch.full((batch,), value, dtype=dtype, device=bench.device)

    by_row = {name: of_all(value) for name, value in filters.items()}
    temperature = of_all(TEMPERATURE)

    def ours():
        seed = torch.arange(batch, dtype=torch.int64, device=bench.device)
        out = torch.empty(batch, dtype=torch.int32, device=bench.device)
        return lambda i: qkv.sample(x[i], seed=seed, temperature=temperature, **by_row, out=out,
                                    ctx=bench.ctx)

    def race(p):
        """A draw by an exponential race: what engines use in place of multinomial, which waits."""
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    def plain(i):
        scaled = x[i] / temperature[:, None]
        if "top_p" not in filters:
            p = scaled.softmax(-1)
            if "min_p" in filters:
                p = p.masked_fill(p < MIN_P * p.amax(-1, keepdim=True), 0)
            return race(p)
        largest, tokens = scaled.topk(min(TOP_K, vocab)) if "top_k" in filters \
            else scaled.sort(-1, descending=True)
        p = largest.softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p >= TOP_P, 0)
        return tokens.gather(1, race(p)[:, None])[:, 0]

    candidates = [Candidate("qkv", ours), Candidate("torch", lambda: plain),
                  *flashinfer_samplers(bench, label, x, temperature, by_row)]
    return logits_problem(bench, label, x, candidates, check)


def flashinfer_samplers(bench, label, x, temperature, by_row):
    """From logits, which only some of its functions take, and from the probabilities of its softmax. One
    top_k for all rows takes another way than one a row; a bound of them, top_k_max, is as good."""
    # Tensors, without which a call cannot be captured; rows draw with streams of their own.
    draw = {name: torch.zeros(1, dtype=torch.int64, device=bench.device) for name in ("seed", "offset")}

    def scaled(i):
        return x[i] / temperature[:, None]

    def probs(theirs, i):
        return theirs.sampling.softmax(x[i], temperature)

    forms = {
        "sample": {
            "logits": lambda theirs, i: theirs.sampling.sampling_from_logits(scaled(i), **draw),
            "probs": lambda theirs, i: theirs.sampling.sampling_from_probs(probs(theirs, i), **draw)},
        "top-k, top-p": {
            "logits": lambda theirs, i: theirs.sampling.top_k_top_p_sampling_from_logits(
                scaled(i), TOP_K, TOP_P, **draw),
            "logits, by row": lambda theirs, i: theirs.sampling.top_k_top_p_sampling_from_logits(
                scaled(i), **by_row, top_k_max=TOP_K, **draw),
            "probs": lambda theirs, i: theirs.sampling.top_k_top_p_sampling_from_probs(
                probs(theirs, i), TOP_K, TOP_P, **draw),
            "probs, cake": lambda theirs, i: theirs.cake_top_k_top_p_sampling_from_probs(
                probs(theirs, i), TOP_K, TOP_P, philox_seed=0, philox_offset=0)},
        "top-p": {"probs": lambda theirs, i: theirs.sampling.top_p_sampling_from_probs(
            probs(theirs, i), **by_row, **draw)},
        "min-p": {"probs": lambda theirs, i: theirs.sampling.min_p_sampling_from_probs(
            probs(theirs, i), **by_row, **draw)},
    }

    def with_form(run):
        def make():
            import flashinfer as theirs

            return lambda i: run(theirs, i)
        return make

    return [candidate for form, run in forms[label].items()
            for candidate in flashinfer_candidate(bench, with_form(run), form)]
