"""The operators of sampling.h beside argmax, against float64 arithmetic; numbers, lists and arrays of frameworks.

SPDX-License-Identifier: Apache-2.0
"""

import math

import numpy as np
import pytest
import torch
from conftest import SEED, close, i32, refused

import qkv

BATCH, VOCAB = 6, 45
WORDS = (VOCAB + 31) // 32


def bits_of(mask):
    """bool [batch, vocab] packed as in sampling.h."""
    padded = np.zeros((mask.shape[0], WORDS * 32), np.uint8)
    padded[:, : mask.shape[1]] = mask
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    mask = rng.random((BATCH, VOCAB)) < 0.8
    mask[:, 3] = True
    prompt = rng.random((BATCH, VOCAB)) < 0.3
    return {
        "logits": torch.from_numpy(rng.standard_normal((BATCH, VOCAB)).astype(np.float32) * 2),
        "counts": torch.from_numpy(rng.integers(0, 3, (BATCH, VOCAB)).astype(np.int32)),
        "prompt": bits_of(prompt),
        "bitmask": bits_of(mask),
        "bias": torch.from_numpy(rng.standard_normal((BATCH, VOCAB)).astype(np.float32)),
        "mask": mask,
        "in_prompt": prompt,
    }


# One value for each request.
VALUES = {
    "repetition": [1.2, 0.8, 1.0, 1.5, 2.0, 1.1],
    "frequency": [0.3, -0.2, 0.0, 1.0, 0.5, 0.1],
    "presence": [0.4, 0.0, -0.5, 0.2, 1.0, 0.3],
    "temperature": [0.7, 1.0, 1.5, 0.0, 0.3, 2.0],
    "top_n_sigma": [1.0, 2.0, 0.5, 1.5, 1.2, 1.1],
    "top_k": [7, 0, 1, 100, 20, 3],
    "top_p": [0.8, 1.0, 0.5, 0.9, 0.3, 0.95],
    "min_p": [0.1, 0.0, 1.0, 0.3, 0.05, 0.2],
    "typical_p": [0.5, 0.9, 1.0, 0.2, 0.7, 0.4],
}
DTYPE = {"top_k": torch.int32}


def head(x, order, count):
    keep = np.zeros(len(x), bool)
    keep[order[:count]] = True
    return keep


def by_value(x):
    return sorted(range(len(x)), key=lambda i: (-x[i], i))


def prefix(p, order, share):
    """How many of the order it takes to reach a share of all the mass, at least one."""
    if share >= 1:
        return len(p)
    sums = np.cumsum(p[order])
    return int(np.searchsorted(sums, share * sums[-1], side="left")) + 1


def reference(r, given, data, kind="logits", order="top_k_first"):
    """Row r in float64 after the stages that are given: (logits, probabilities)."""
    x = data["logits"][r].double().numpy()
    value = {name: VALUES[name][r] for name in given if name in VALUES}
    if kind == "probs":
        p = np.exp(x) / np.exp(x).sum()
        l = x
    else:
        l = x
        count = data["counts"][r].numpy()
        if "repetition" in value:
            touched = ((count > 0) & ("counts" in given)) | (data["in_prompt"][r] & ("prompt" in given))
            l = np.where(touched, np.where(l > 0, l / value["repetition"], l * value["repetition"]), l)
        if "frequency" in value:
            l = l - value["frequency"] * count
        if "presence" in value:
            l = np.where(count > 0, l - value["presence"], l)
        if "bias" in given:
            l = l + data["bias"][r].double().numpy()
        if "bitmask" in given:
            l = np.where(data["mask"][r], l, -np.inf)
        if "temperature" in value:
            t = value["temperature"]
            l = l / t if t else np.where(head(l, by_value(l), 1), l, -np.inf)
        if "top_n_sigma" in value:
            finite = l[l > -np.inf]
            l = np.where(l >= l.max() - value["top_n_sigma"] * finite.std(), l, -np.inf)
        if value.get("top_k") and order == "top_k_first":
            l = np.where(head(l, by_value(l), value["top_k"]), l, -np.inf)
        p = np.exp(l - l.max())
        p /= p.sum()
    if kind == "probs" and value.get("top_k") and order == "top_k_first":
        p = np.where(head(p, by_value(p), value["top_k"]), p, 0)
    if "top_p" in value:
        at = by_value(p)
        p = np.where(head(p, at, prefix(p, at, value["top_p"])), p, 0)
    if value.get("top_k") and order == "joint":
        p = np.where(head(p, by_value(p), value["top_k"]), p, 0)
    if "min_p" in value:
        p = np.where(p >= value["min_p"] * p.max(), p, 0)
    if "typical_p" in value:
        q = p / p.sum()
        surprise = np.array([-math.log(v) if v else math.inf for v in q])
        entropy = sum(v * s for v, s in zip(q, surprise) if v)
        at = sorted(range(len(q)), key=lambda i: (abs(surprise[i] - entropy), -q[i], i))
        p = np.where(head(p, at, prefix(q, at, value["typical_p"])), p, 0)
    return l, p / p.sum()


# Lists of what is given; each is tried with arrays and, row by row, with numbers.
LOGIT_STAGES = [
    ["temperature"], ["repetition", "counts"], ["repetition", "prompt"], ["repetition", "counts", "prompt"],
    ["frequency", "counts"], ["presence", "counts"], ["bias"], ["bitmask"], ["top_n_sigma"], ["top_k"],
    ["repetition", "frequency", "presence", "counts", "prompt", "bias", "bitmask", "temperature", "top_k"],
]
PROB_STAGES = [
    [], ["top_k"], ["top_p"], ["min_p"], ["typical_p"], ["top_k", "top_p", "min_p", "typical_p"], ["top_p", "min_p"],
]


def arguments(given, data, device="cpu"):
    """Of all requests."""
    result = {}
    for name in given:
        of_all = torch.tensor(VALUES[name], dtype=DTYPE.get(name, torch.float32)) if name in VALUES else data[name]
        result[name] = of_all.to(device)
    return result


def of_row(given, data, r):
    """Of request r, values as numbers."""
    return {name: VALUES[name][r] if name in VALUES else data[name][r : r + 1] for name in given}


@pytest.mark.parametrize("given", LOGIT_STAGES, ids="-".join)
def test_masked_logits_are_those_of_the_formula(given, device):
    data = inputs()
    x = data["logits"].to(device)
    got = qkv.mask_logits(x, **arguments(given, data, device))
    assert got.dtype == x.dtype
    for r in range(BATCH):
        expected, _ = reference(r, given, data)
        close(got[r], torch.from_numpy(expected))
        assert torch.equal(qkv.mask_logits(x[r : r + 1], **{
            n: v.to(device) if torch.is_tensor(v) else v for n, v in of_row(given, data, r).items()}), got[r : r + 1])
    copy = x.clone()
    assert qkv.mask_logits(copy, **arguments(given, data, device), out=copy) is copy and torch.equal(copy, got)


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
@pytest.mark.parametrize("kind", ["logits", "probs"])
@pytest.mark.parametrize("after", PROB_STAGES, ids="-".join)
def test_probabilities_are_those_of_the_formula(after, kind, order, device):
    data = inputs(2)
    x = data["logits"].to(device) if kind == "logits" else data["logits"].double().softmax(-1).float().to(device)
    for before in ([[]] if kind == "probs" else [[], LOGIT_STAGES[-1]]):
        given = list(dict.fromkeys([*before, *after]))
        options = {"kind": kind, "order": order}
        got = qkv.renormalize(x, **arguments(given, data, device), **options)
        tokens, valid = qkv.sample(x, seed=list(range(BATCH)) if device == "cpu" else 3, valid=True,
                                   **arguments(given, data, device), **options)
        assert valid.all() and (got.gather(1, tokens.long()[:, None]) > 0).all()
        for r in range(BATCH):
            _, expected = reference(r, given, data, kind, order)
            close(got[r], torch.from_numpy(expected))
            assert ((got[r].cpu() > 0).numpy() == (expected > 0)).all()


def test_tokens_have_the_distribution(device):
    data = inputs(SEED)
    given = ["temperature", "top_k", "top_p", "counts", "presence"]
    for r in (0, 5):
        _, p = reference(r, given, data)
        draws = 8000
        x, options = data["logits"][r : r + 1].to(device), of_row(given, data, r)
        options["counts"] = options["counts"].to(device).expand(draws, VOCAB).contiguous()
        seed = torch.arange(draws, device=device) + SEED
        tokens = qkv.sample(x.expand(draws, VOCAB).contiguous(), seed=seed, **options).cpu()
        count = np.bincount(tokens.numpy(), minlength=VOCAB)
        assert count[p == 0].sum() == 0
        wanted = draws * p[p > 0]
        free = len(wanted) - 1
        assert ((count[p > 0] - wanted) ** 2 / wanted).sum() <= free + 4 * math.sqrt(2 * free) + 25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_16_bits(dtype, device):
    x = inputs(3)["logits"].to(device, dtype)
    p = qkv.renormalize(x, temperature=0.5)
    assert p.dtype == dtype
    close(p, (x.double() / 0.5).softmax(-1), dtype)
    wide = torch.empty(x.shape, device=device)
    assert qkv.renormalize(x, temperature=0.5, out=wide) is wide
    close(wide, (x.double() / 0.5).softmax(-1))
    seed = torch.arange(BATCH, device=device)
    assert torch.equal(qkv.sample(x, seed=seed, top_k=5), qkv.sample(x.float(), seed=seed, top_k=5))
    assert qkv.mask_logits(x, top_k=5).dtype == dtype


def test_requests_with_rows_of_others(device):
    x = inputs(4)["logits"].to(device)
    rows = i32(2, 0, 2, 5, 1, 1, 4).to(device)
    seed = torch.arange(7, device=device)
    taken = x[rows.long()]
    assert torch.equal(qkv.sample(x, seed=seed, indices=rows), qkv.sample(taken, seed=seed))
    assert torch.equal(qkv.renormalize(x, top_p=0.5, indices=rows), qkv.renormalize(taken, top_p=0.5))
    assert torch.equal(qkv.mask_logits(x, top_k=3, indices=rows), qkv.mask_logits(taken, top_k=3))
    _, valid = qkv.sample(x, seed=1, indices=i32(0, BATCH, -1).to(device), valid=True)
    assert valid.tolist() == [True, False, False]


def test_rows_without_a_chance_are_told(device):
    nan, inf = math.nan, math.inf
    x = torch.tensor([[1.0, 2, 3], [nan, 1, 2], [inf, 1, 2], [-inf] * 3, [nan] * 3], device=device)
    tokens, valid = qkv.sample(x, seed=1, valid=True)
    assert valid.dtype == torch.bool and valid.tolist() == [True, False, False, False, False]
    assert tokens[2:].tolist() == [0, 0, 0]
    p = torch.tensor([[0.5, 0.5, 0], [-0.1, 1, 0], [0, 0, 0], [nan, 1, 0]], device=device)
    tokens, valid = qkv.sample(p, seed=1, kind="probs", valid=True)
    assert valid.tolist() == [True, False, False, False] and tokens[1:].tolist() == [1, 0, 1]
    for dtype in (torch.bool, torch.uint8):
        given = torch.zeros(4, dtype=dtype, device=device)
        out, same = qkv.renormalize(p, kind="probs", valid=given)
        assert same is given and given.tolist() == valid.tolist()
        assert torch.equal(out, qkv.renormalize(p, kind="probs", valid=False))


def test_values_are_numbers_lists_and_arrays_of_any_framework():
    x = inputs(5)["logits"].numpy()
    options = {"temperature": 0.7, "top_k": 9, "top_p": 0.9}
    expected = qkv.sample(x, seed=[3] * BATCH, offset=2, **options)
    assert type(expected) is np.ndarray and expected.dtype == np.int32
    forms = [
        {"seed": 3, "offset": 2},
        {"seed": np.uint64(3), "offset": np.array(2)},  # without axes: one for all
        {"seed": np.array([3]), "offset": [2]},
        {"seed": torch.tensor(3), "offset": torch.tensor([2] * BATCH)},
    ]
    for form in forms:
        assert (qkv.sample(x, **form, **options) == expected).all()
    of_all = {n: np.array([v] * BATCH, np.int32 if n == "top_k" else np.float32) for n, v in options.items()}
    assert (qkv.sample(x, seed=3, offset=2, **of_all) == expected).all()
    scalars = {n: np.asarray(v, np.int32 if n == "top_k" else np.float32) for n, v in options.items()}
    assert (qkv.sample(x, seed=3, offset=2, **scalars) == expected).all()
    tokens, valid = qkv.sample(x, seed=3, offset=2, valid=True, **options)
    assert valid.dtype == np.bool_ and valid.all()


def test_jax_arrays():
    jax = pytest.importorskip("jax")
    x = inputs(6)["logits"]
    ours = jax.numpy.asarray(x.numpy())
    tokens, valid = qkv.sample(ours, seed=3, top_k=5, valid=True)
    assert isinstance(tokens, jax.Array) and np.asarray(valid).all()
    assert (np.asarray(tokens) == qkv.sample(x, seed=3, top_k=5).numpy()).all()
    values, indices = qkv.top_k(ours, 4)
    assert (np.asarray(values) == x.topk(4).values.numpy()).all() and isinstance(indices, jax.Array)


@pytest.mark.parametrize("k", [1, 2, 17, VOCAB])
def test_top_k_is_a_sort(k, device):
    x = inputs(7)["logits"].to(device)
    x[:, ::3] = x[:, :1]  # ties
    values, indices = qkv.top_k(x, k)
    order = x.cpu().argsort(dim=-1, descending=True, stable=True)[:, :k]
    assert torch.equal(indices.cpu(), order.int()) and indices.dtype == torch.int32
    assert torch.equal(values.cpu(), x.cpu().gather(1, order))
    again, places = qkv.top_k(x, k, sorted=False)
    assert torch.equal(places.cpu(), order.sort(-1).values.int())
    assert torch.equal(again, x.gather(1, places.long()))
    given = torch.empty_like(values), torch.empty_like(indices)
    got = qkv.top_k(x, k, values=given[0], indices=given[1])
    assert got[0] is given[0] and got[1] is given[1] and torch.equal(given[1], indices)


def test_log_probs_and_ranks(device):
    x = inputs(8)["logits"].to(device)
    x[0, 4] = -math.inf
    x[1, 7] = x[1, 2]
    tokens = torch.randint(VOCAB, (BATCH, 5), dtype=torch.int32, device=device)
    tokens[0, :3] = i32(4, -1, VOCAB)
    tokens[1, :2] = i32(7, 2)
    got, ranks = qkv.log_probs(x, tokens, ranks=True)
    assert got.dtype == torch.float32 and ranks.dtype == torch.int32
    assert got[0, :3].tolist() == [-math.inf] * 3
    expected = x.double().log_softmax(-1)
    order = x.cpu().argsort(dim=-1, descending=True, stable=True)
    for r in range(BATCH):
        for i, token in enumerate(tokens[r].tolist()):
            if (r, i) not in ((0, 1), (0, 2)):
                close(got[r, i], expected[r, token])
                assert ranks[r, i] == order[r].tolist().index(token)
    assert torch.equal(qkv.log_probs(x, tokens), got)
    if device == "cpu":
        assert torch.equal(qkv.log_probs(x, tokens.tolist()), got)
    values, indices = qkv.top_k(x, 3)
    top, places = qkv.log_probs(x, indices, ranks=True)
    assert (places.cpu() == torch.arange(3)).all()
    close(top, expected.topk(3).values)


def distributed_as(tokens, p):
    count, p = np.bincount(tokens.cpu().numpy(), minlength=len(p)), p.double().numpy()
    assert count[p == 0].sum() == 0
    wanted = len(tokens) * p[p > 0]
    free = len(wanted) - 1
    assert ((count[p > 0] - wanted) ** 2 / wanted).sum() <= free + 4 * math.sqrt(2 * free) + 25


@pytest.mark.parametrize("form", ["chain", "tree", "without draft"])
def test_verified_tokens_are_distributed_as_the_target(form, device):
    rng, draws, nodes, vocab = np.random.default_rng(SEED), 8000, 3, 6
    target = torch.from_numpy(rng.dirichlet(np.ones(vocab), nodes + 1).astype(np.float32))
    draft = torch.from_numpy(rng.dirichlet(np.ones(vocab), nodes).astype(np.float32))
    parents = None
    if form == "tree":  # two children of the root, and one of the first
        parents, draft[1] = i32(-1, -1, 0)[None].to(device), draft[0]
    drafted = torch.stack([torch.multinomial(d, draws, replacement=True) for d in draft], 1).int()
    if form == "without draft":
        drafted = drafted[:1].expand(draws, nodes).contiguous()
    options = {"seed": torch.arange(draws, device=device) + SEED, "parents": parents}
    given = None if form == "without draft" else draft.expand(draws, nodes, vocab).contiguous().to(device)
    many = target.expand(draws, nodes + 1, vocab).contiguous().to(device)
    accepted, number, tokens = qkv.verify(many, drafted.to(device), given, **options)
    assert accepted.shape == tokens.shape == (draws, nodes + 1) and number.shape == (draws,)
    accepted, number, tokens = accepted.cpu(), number.cpu(), tokens.cpu()
    distributed_as(tokens[:, 0], target[0])
    place = torch.arange(nodes + 1)
    assert ((accepted == -1) == (place >= number[:, None])).all()
    assert ((tokens == -1) == (place > number[:, None])).all()
    for i in range(nodes):
        on = number > i
        assert torch.equal(tokens[on, i], drafted[on, accepted[on, i].long()])
    first = number >= 1
    node = accepted[first, 0]
    for n in node.unique().tolist():
        distributed_as(tokens[first][node == n, 1], target[n + 1])


def test_verify_takes_numbers_and_outputs():
    p = torch.full((2, 3, 5), 0.2)
    drafted = [[1, 2], [3, 4]]
    a = qkv.verify(p, drafted, p[:, :2].contiguous(), seed=7, offset=1)
    assert a[1].tolist() == [2, 2]  # the draft is the target
    given = [torch.empty_like(x) for x in a]
    b = qkv.verify(p, torch.tensor(drafted, dtype=torch.int32), p[:, :2].contiguous(), seed=[7, 7], offset=torch.tensor([1, 1]),
                   parents=[[-1, 0]], accepted=given[0], num_accepted=given[1], tokens=given[2])
    assert all(x is y and torch.equal(x, z) for x, y, z in zip(b, given, a))


@pytest.mark.parametrize("text, call", [
    ("temperature[0]: expected >= 0", lambda x: qkv.sample(x, seed=1, temperature=-1.0)),
    ("top_p[2]: expected in (0, 1]", lambda x: qkv.sample(x, seed=1, top_p=[1.0, 0.5, 0.0, 1, 1, 1])),
    ("typical_p[0]: expected in (0, 1]", lambda x: qkv.renormalize(x, typical_p=2.0)),
    ("counts: expected a tensor", lambda x: qkv.sample(x, seed=1, frequency=1.0)),
    ("temperature: expected NULL for rows of prob", lambda x: qkv.sample(x, seed=1, kind="probs", temperature=1.0)),
    ('kind: expected "logits" or "probs"', lambda x: qkv.sample(x, seed=1, kind="tokens")),
    ('order: expected "top_k_first" or "joint"', lambda x: qkv.renormalize(x, order="both")),
    ("rows: expected", lambda x: qkv.sample(x[0], seed=1)),
    ("bitmask: expected shape", lambda x: qkv.mask_logits(x, bitmask=torch.zeros(1, 9, dtype=torch.int32))),
    ("valid: expected shape", lambda x: qkv.sample(x, seed=1, valid=torch.zeros(3, dtype=torch.bool))),
    ("k: expected 1 to vocab, 45, got 46", lambda x: qkv.top_k(x, VOCAB + 1)),
    ("k: expected 1 to vocab, 45, got 0", lambda x: qkv.top_k(x, 0)),
    ("tokens: expected", lambda x: qkv.log_probs(x, i32(1))),
    ("draft: expected", lambda x: qkv.verify(x[None], [[1] * (BATCH - 1)], x, seed=1)),
])
def test_errors_name_the_argument(text, call):
    refused(text, lambda: call(inputs()["logits"]))


@pytest.mark.gpu
def test_calls_with_numbers_are_captured_into_graphs():
    """Nothing is allocated for them, nor copied."""
    x = torch.randn(4, 1000, device="cuda")
    out = torch.empty(4, dtype=torch.int32, device="cuda")
    options = {"seed": 2**64 - 1, "offset": 3, "temperature": 0.7, "top_k": 50, "top_p": 0.9}
    qkv.sample(x, out=out, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        allocated = torch.cuda.memory_allocated()
        qkv.sample(x, out=out, **options)
        assert torch.cuda.memory_allocated() == allocated
    x.copy_(torch.randn(4, 1000, device="cuda"))
    graph.replay()
    assert torch.equal(out, qkv.sample(x, **options))
