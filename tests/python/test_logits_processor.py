"""LogitsPipe against distributions computed in float64, and against the one call that does the same.

SPDX-License-Identifier: Apache-2.0
"""

import itertools
import math

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from conftest import SEED, refused
import qkv
from qkv.logits_processor import (
    Bias, Bitmask, Frequency, Greedy, LogitsPipe, LogitsProcessor, MinP, Presence, Repetition, Sample, Softmax,
    Temperature, TensorType, TopK, TopNSigma, TopP, TypicalP, UserStage,
)
from test_sampling import BATCH, LOGIT_STAGES, PROB_STAGES, VOCAB, arguments, inputs


def expected(x, names, values, is_probs=False):
    """One row's last stage in Python floats; names are of stages in order."""
    p = [float(v) for v in x]
    if not is_probs:
        p = [-math.inf if math.isnan(v) else v for v in p]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    none = -math.inf if not is_probs else 0.0
    for name in names:
        value = values.get(name)
        if name == "temperature":
            if value == 0:
                p = [0.0 if i == order[0] else -math.inf for i in range(len(p))]
            else:
                p = [v / value for v in p]
        elif name == "softmax":
            e = [math.exp(v - max(p)) if v > -math.inf else 0.0 for v in p]
            p, none = [v / sum(e) for v in e], 0.0
        elif name == "top_k":
            keep = set(order[:value]) if value else set(order)
            p = [v if i in keep else none for i, v in enumerate(p)]
        elif name == "top_p":
            keep, total = set(), 0.0
            for i in order:
                if total >= value and value < 1:
                    break
                keep.add(i)
                total += p[i]
            p = [v if i in keep else 0.0 for i, v in enumerate(p)]
        elif name == "min_p":
            p = [v if v >= value * max(p) else 0.0 for v in p]
        if none == 0.0 and name != "softmax" and sum(p) > 0:
            p = [v / sum(p) for v in p]
    return p


STAGES = {
    "temperature": Temperature, "softmax": Softmax, "top_k": TopK, "top_p": TopP, "min_p": MinP,
}
VALUES = {"temperature": 0.7, "top_k": 7, "top_p": 0.8, "min_p": 0.15}


def make(names, end=(), **options):
    return LogitsPipe([STAGES[name]() for name in names] + list(end), **options)


def values_of(names):
    return {name: VALUES[name] for name in names if name in VALUES}


def orders():
    """Every order of every choice of stages that goes from logits to probabilities."""
    for k in range(5):
        for chosen in itertools.combinations(VALUES, k):
            for names in itertools.permutations((*chosen, "softmax")):
                at = names.index("softmax")
                before, after = names[:at], names[at + 1 :]
                if {"top_p", "min_p"} & set(before) or "temperature" in after:
                    continue
                yield names


ORDERS = list(orders())


def random_logits(seed, batch, vocab, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal((batch, vocab)) * 2).astype(dtype)


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_probabilities_are_those_of_the_formula(names, framework):
    logits = random_logits(1, 5, 40)
    x = torch.from_numpy(logits) if framework == "torch" else logits
    p = make(names)(x, **values_of(names))
    assert type(p) is type(x) and str(p.dtype).endswith("float32")
    for row, got in zip(logits, np.asarray(p)):
        np.testing.assert_allclose(got, expected(row, names, VALUES), atol=2e-6)


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_fused_and_unfused_draw_the_same_tokens(names, framework):
    logits = random_logits(2, 300, 50)
    x = torch.from_numpy(logits) if framework == "torch" else logits
    fused, unfused = make(names, [Sample()]), make(names, [Sample()], compile=False)
    values = values_of(names)
    a, b = fused(x, seed=3, **values), unfused(x, seed=3, **values)
    assert np.array_equal(np.asarray(a), np.asarray(b))
    assert len(set(np.asarray(a).tolist())) > 10
    assert np.asarray(a).dtype == np.int32 and type(a) is type(x)


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
@pytest.mark.parametrize("compile", [True, False])
def test_tokens_have_the_distribution_of_the_formula(names, compile):
    vocab, draws = 12, 8000
    row = random_logits(SEED, 1, vocab)
    x = torch.from_numpy(row).expand(draws, vocab).contiguous()
    p = np.array(expected(row[0], names, VALUES))
    tokens = make(names, [Sample()], compile=compile)(x, seed=SEED, **values_of(names))
    count = np.bincount(tokens.numpy(), minlength=vocab)
    assert count[p == 0].sum() == 0
    wanted = draws * p[p > 0]
    chi_square = ((count[p > 0] - wanted) ** 2 / wanted).sum()
    free = (p > 0).sum() - 1
    assert chi_square <= free + 4 * math.sqrt(2 * free) + 25


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("order", [("top_k", "top_p", "min_p"), ("top_p", "min_p", "top_k")])
def test_probabilities_go_in_too(compile, order):
    logits = torch.from_numpy(random_logits(5, 200, 30))
    p = logits.double().softmax(-1).float()
    pipe = make(order, [Sample()], compile=compile, input_type="probs")
    from_logits = make(("softmax", *order), [Sample()], compile=compile)
    values = values_of(order)
    assert torch.equal(pipe(p, seed=9, **values), from_logits(logits, seed=9, **values))
    end = make(order, input_type=TensorType.PROBS)(p, **values)
    for row, got in zip(p.numpy(), end.numpy()):
        np.testing.assert_allclose(got, expected(row, order, VALUES, True), atol=2e-6)


# Stages of the names that qkv.sample has.
OF_CALL = {
    "repetition": Repetition, "frequency": Frequency, "presence": Presence, "bias": Bias, "bitmask": Bitmask,
    "temperature": Temperature, "top_n_sigma": TopNSigma, "top_k": TopK, "softmax": Softmax, "top_p": TopP,
    "min_p": MinP, "typical_p": TypicalP,
}


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("after", PROB_STAGES, ids="-".join)
@pytest.mark.parametrize("before", LOGIT_STAGES, ids="-".join)
def test_a_pipe_is_the_one_call(before, after, compile, device):
    data = inputs(SEED)
    given = list(dict.fromkeys([*before, *after]))
    values = arguments(given, data, device)
    x = data["logits"].to(device)
    stages = [OF_CALL[name]() for name in OF_CALL if name in (*given, "softmax")]
    pipe = LogitsPipe([*stages, Sample()], compile=compile)
    seed = torch.arange(BATCH, device=device)
    assert torch.equal(pipe(x, seed=seed, **values), qkv.sample(x, seed=seed, **values))
    assert torch.equal(LogitsPipe(stages, compile=compile)(x, **values), qkv.renormalize(x, **values))
    on_logits = [OF_CALL[name]() for name in OF_CALL if name in before]
    masked = LogitsPipe(on_logits, compile=compile, input_type="logits")(x, **{n: values[n] for n in before})
    assert torch.equal(masked, qkv.mask_logits(x, **{n: values[n] for n in before}))


def test_what_is_fused_is_said():
    text = repr(LogitsPipe([Temperature(), TopK(40), Softmax(), TopP(), MinP(), Sample()]))
    assert text == (
        "LogitsPipe(qkv[Temperature(), TopK(top_k=40), Softmax(), TopP(), MinP(), Sample()])"
    )
    assert repr(LogitsPipe([Temperature(), Greedy()])) == "LogitsPipe(qkv.argmax)"
    assert repr(LogitsPipe([Bias(), Temperature(), Greedy()])) == (
        "LogitsPipe(qkv[Bias(), TopK(top_k=1), Sample(seed=[0])])"
    )
    assert repr(LogitsPipe([TopK(), Bias(), Greedy()])) == "LogitsPipe(qkv[TopK(), Bias()] -> qkv.argmax)"


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_each_row_has_its_own_parameters(compile, framework):
    batch, vocab = 64, 30
    logits = random_logits(6, batch, vocab)
    rng = np.random.default_rng(7)
    rows = {
        "temperature": rng.choice([0.0, 0.5, 1.3], batch).astype(np.float32),
        "top_k": rng.choice([0, 1, 5, 1000], batch).astype(np.int32),
        "top_p": rng.choice([0.3, 0.9, 1.0], batch).astype(np.float32),
        "min_p": rng.choice([0.0, 0.1, 1.0], batch).astype(np.float32),
        "seed": rng.integers(1 << 63, size=batch).astype(np.uint64) * 2,
        "offset": rng.integers(1 << 40, size=batch).astype(np.uint64),
    }
    as_array = torch.from_numpy if framework == "torch" else np.asarray
    stages = [Temperature(), Softmax(), TopK(), TopP(), MinP(), Sample()]
    pipe = LogitsPipe(stages, compile=compile)
    tokens = pipe(as_array(logits), **{n: as_array(v) for n, v in rows.items()})
    for r in range(batch):
        one = LogitsPipe(stages)(
            as_array(logits[r : r + 1]), **{n: v[r].item() for n, v in rows.items()}
        )
        assert int(tokens[r]) == int(one[0]), f"row {r}"


@pytest.mark.parametrize("compile", [True, False])
def test_one_seed_gives_rows_their_own_numbers(compile):
    x = torch.zeros(4096, 64)
    pipe = LogitsPipe([Softmax(), Sample()], compile=compile)
    a, b = pipe(x, seed=5), pipe(x, seed=5, offset=1)
    count = torch.bincount(a.long(), minlength=64)
    assert count.min() > 25 and count.max() < 110  # 64 is expected, 8 the standard deviation
    assert 20 < int((a == b).sum()) < 120  # a new draw of every row
    assert torch.equal(a, pipe(x, seed=5)) and not torch.equal(a, pipe(x, seed=6))
    assert int(a[0]) == int(pipe(x[:1], seed=5)[0])
    assert torch.equal(a, torch.from_numpy(pipe(x.numpy(), seed=5)))
    seeds = torch.arange(4096)  # i64, as torch makes them
    assert torch.equal(pipe(x, seed=seeds), pipe(x, seed=seeds.view(torch.uint64)))
    for seed in (0, (1 << 64) - 1):
        assert torch.equal(pipe(x, seed=seed), torch.from_numpy(pipe(x.numpy(), seed=seed)))


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(compile, dtype):
    x = torch.from_numpy(random_logits(8, 100, 33)).to(dtype)
    stages = [Temperature(0.9), Softmax(), TopP(0.95), Sample()]
    tokens = LogitsPipe(stages, compile=compile)(x, seed=1)
    assert torch.equal(tokens, LogitsPipe(stages)(x.float(), seed=1))
    out = torch.full((100,), -1, dtype=torch.int32)
    assert LogitsPipe(stages, compile=compile)(x, seed=1, out=out) is out
    assert torch.equal(out, tokens)


@pytest.mark.parametrize("compile", [True, False])
def test_arrays_of_another_framework(compile):
    jax = pytest.importorskip("jax")
    x = random_logits(9, 20, 30)
    stages = [Temperature(0.9), Softmax(), TopP(0.95), Sample(seed=4)]
    tokens = LogitsPipe(stages, compile=compile)(jax.numpy.asarray(x))
    assert isinstance(tokens, jax.Array)
    assert np.array_equal(np.asarray(tokens), LogitsPipe(stages)(x))


EDGE = {
    "NaN is -inf": [1.0, math.nan, 0.5, math.nan],
    "-inf has no probability": [1.0, -math.inf, 0.5, -math.inf],
    "a row of nothing gives 0": [-math.inf] * 4,
    "a row of NaN gives 0": [math.nan] * 4,
    "equals are ordered by index": [2.0, 2.0, 2.0, 2.0],
    "+inf takes all": [0.0, math.inf, 1.0, math.inf],
    "far apart": [0.0, -1e30, 3e4, 3e4],
}


@pytest.mark.parametrize("why", EDGE)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_edges_are_the_same_in_both_ways(why, temperature, framework):
    logits = np.tile(np.array(EDGE[why], np.float32), (200, 1))
    x = torch.from_numpy(logits) if framework == "torch" else logits
    for k, top_p, min_p in ((0, 1.0, 0.0), (1, 1.0, 0.0), (3, 0.5, 0.0), (9, 1.0, 1.0)):
        tokens = [
            LogitsPipe(
                [Temperature(), TopK(), Softmax(), TopP(), MinP(), Sample()], compile=compile
            )(x, temperature=temperature, top_k=k, top_p=top_p, min_p=min_p, seed=2)
            for compile in (True, False)
        ]
        assert np.array_equal(*map(np.asarray, tokens)), (k, top_p, min_p)
        if "gives 0" in why or temperature == 0:
            assert set(np.asarray(tokens[0]).tolist()) == {
                0 if "gives 0" in why else int(np.nanargmax(logits[0]))
            }


def test_nothing_and_one_token():
    stages = [Temperature(0.5), Softmax(), TopP(0.5), Sample(seed=1)]
    for compile in (True, False):
        pipe = LogitsPipe(stages, compile=compile)
        assert pipe(torch.zeros(0, 9)).shape == (0,)
        assert pipe(torch.zeros(3, 1)).tolist() == [0, 0, 0]
    p = LogitsPipe(stages[:-1])(torch.zeros(0, 9))
    assert p.shape == (0, 9)
    p = LogitsPipe([Softmax()])(torch.full((1, 3), -math.inf))
    assert p.tolist() == [[0, 0, 0]]


def test_logits_that_end_early_are_masked():
    x = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    masked = LogitsPipe([Temperature(), TopK()], input_type="logits")(x, temperature=2.0, top_k=2)
    assert masked.tolist() == [[-math.inf, 1.5, -math.inf, 1.5]]


@pytest.mark.parametrize("compile", [True, False])
def test_greedy_takes_the_first_of_the_largest(compile):
    x = torch.tensor([[1.0, 5.0, 5.0], [0.0, -1.0, -2.0], [math.nan, 1.0, 2.0]])
    assert LogitsPipe([Greedy()], compile=compile, input_type="logits")(x).tolist() == [1, 0, 2]
    pipe = LogitsPipe([Temperature(), Softmax(), TopP(0.5), Greedy()], compile=compile)
    assert pipe(x, temperature=3.0).tolist() == [1, 0, 2]
    bias = torch.tensor([[0.0, 0.0, 5.0]])
    pipe = LogitsPipe([Bias(), Temperature(), Greedy()], compile=compile)
    assert pipe(x, bias=bias, temperature=3.0).tolist() == [2, 2, 2]
    pipe = LogitsPipe([TopK(), Bias(), Softmax(), Greedy()], compile=compile)
    assert pipe(x, bias=bias, top_k=2).tolist() == [2, 0, 2]


def test_values_of_the_call_win_over_those_of_the_stage():
    x = torch.from_numpy(random_logits(10, 50, 20))
    pipe = LogitsPipe([Temperature(0.7), TopK(4), Softmax(), TopP(0.9), Sample(seed=3)])
    plain = LogitsPipe([Temperature(), TopK(), Softmax(), TopP(), Sample()])
    values = dict(temperature=0.7, top_k=4, top_p=0.9, seed=3)
    assert torch.equal(pipe(x), plain(x, **values))
    other = dict(values, top_k=2, seed=8)
    assert torch.equal(pipe(x, top_k=2, seed=8), plain(x, **other))
    assert torch.equal(pipe(x), plain(x, **values))  # a call leaves nothing behind


@pytest.mark.parametrize("compile", [True, False])
def test_values_of_stages_survive_fusion(compile):
    x = inputs(14)["logits"]
    counts, bias = inputs(14)["counts"], inputs(14)["bias"]
    pipe = LogitsPipe(
        [Presence(0.5), Bias(bias), Temperature(torch.full((BATCH,), 0.7)), TopK(12), Softmax(), MinP(0.01), TopK(4),
         Sample(seed=[5], offset=2)], compile=compile)
    kept = qkv.renormalize(x, counts=counts, presence=0.5, bias=bias, temperature=0.7, top_k=12, min_p=0.01)
    expected = qkv.sample(kept, kind="probs", top_k=4, seed=5, offset=2)
    assert torch.equal(pipe(x, counts=counts), expected)
    assert torch.equal(pipe(x, counts=counts, presence=None), expected)
    other = qkv.sample(x, counts=counts, presence=2.0, bias=bias, temperature=1.5, top_k=3, min_p=0.01, seed=8, offset=2)
    assert torch.equal(pipe(x, counts=counts, presence=2.0, temperature=1.5, top_k=3, seed=[8]), other)
    assert torch.equal(pipe(x, counts=counts), expected)


@pytest.mark.parametrize("compile", [True, False])
def test_longer_rows_and_more_of_them(compile):
    pipe = LogitsPipe([Temperature(0.9), Softmax(), TopP(0.95), Sample()], compile=compile)
    for batch, vocab in ((2, 30), (5, 30), (1, 100), (3, 7), (40, 200), (2, 30)):
        x = torch.from_numpy(random_logits(batch, batch, vocab))
        seed = list(range(batch))
        assert torch.equal(pipe(x, seed=seed), qkv.sample(x, seed=seed, temperature=0.9, top_p=0.95))


def test_indices_and_valid():
    x = torch.from_numpy(random_logits(15, 4, 20))
    x[1] = -math.inf
    indices = torch.tensor([3, 1, 0, 0, 2], dtype=torch.int32)
    pipe = LogitsPipe([Softmax(), TopP(0.9), Sample()])
    tokens, valid = pipe(x, seed=[1, 2, 3, 4, 5], indices=indices, valid=True)
    assert torch.equal(tokens, qkv.sample(x, seed=[1, 2, 3, 4, 5], top_p=0.9, indices=indices))
    assert valid.tolist() == [True, False, True, True, True]
    assert pipe(x, seed=3, indices=indices).shape == (5,)
    rows = LogitsPipe([Softmax()])(x, indices=indices)
    assert torch.equal(rows, qkv.renormalize(x, indices=indices))
    refused("valid: expected a pipe that is one kernel", lambda: LogitsPipe([Plus(), Softmax()])(x, valid=True, plus=0))


class Plus(LogitsProcessor):
    """A stage of the user's own."""

    moves = {TensorType.LOGITS: TensorType.LOGITS}
    parameters = ("plus",)

    def apply(self, x, kind, plus):
        assert kind is TensorType.LOGITS and str(x.dtype).endswith("float32")
        return x + plus


class Square(LogitsProcessor):
    moves = {TensorType.PROBS: TensorType.PROBS}

    def apply(self, x, kind):
        return x * x


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_a_stage_of_ones_own(compile, framework):
    x = torch.from_numpy(random_logits(12, 50, 20))
    plus = torch.zeros(20)
    plus[3] = math.inf
    if framework == "numpy":
        x, plus = x.numpy(), plus.numpy()
    pipe = LogitsPipe([Plus(), Temperature(), Softmax(), Sample()], compile=compile)
    assert repr(pipe) == "LogitsPipe(Plus() -> qkv[Temperature(), Softmax(), Sample()])"
    assert pipe(x, plus=plus, temperature=1.0, seed=1).tolist() == [3] * 50
    pipe = LogitsPipe([Plus(plus=0.0), Softmax(), Sample()], compile=compile)
    assert (pipe(x, seed=1) == LogitsPipe([Softmax(), Sample()])(x, seed=1)).all()
    # between stages of the library, of logits and of probabilities; and last
    pipe = LogitsPipe([Temperature(), Plus(plus=1.0), TopK(5), Softmax(), Square(), TopP(), Sample()], compile=compile)
    assert repr(pipe) == (
        "LogitsPipe(qkv[Temperature()] -> Plus(plus=1.0) -> qkv[TopK(top_k=5), Softmax()] -> Square() -> "
        "qkv[TopP(), Sample()])"
    )
    p = qkv.renormalize(x, temperature=0.7, top_k=5)
    expected = qkv.sample(p * p, kind="probs", top_p=0.8, seed=list(range(50)))
    tokens = pipe(x, temperature=0.7, top_p=0.8, seed=list(range(50)))
    assert (tokens == expected).mean(dtype=float if framework == "numpy" else torch.float64) > 0.95  # x + 1 rounds
    last = LogitsPipe([Softmax(), Square()], compile=compile)
    np.testing.assert_array_equal(np.asarray(last(x)), np.asarray(qkv.renormalize(x)) ** 2)
    refused("out: expected None", lambda: last(x, out=x))
    refused("plus: expected a value", lambda: LogitsPipe([Plus(), Softmax()])(x))
    assert LogitsPipe([Plus(), Greedy()])(x, plus=plus).tolist() == [3] * 50


PENALTY = """
QI_FN float logits_stage(float logit, float value, float element, int token, int request)
{
    return token % 3 == 0 ? logit - value * element : logit + (float)request;
}
"""


@pytest.mark.parametrize("compile", [True, False])
def test_a_stage_in_c(compile):
    data = inputs(16)
    x, cost = data["logits"], data["bias"]
    stage = UserStage(PENALTY, value="strength", tensor="cost", default=2.0)
    pipe = LogitsPipe([Temperature(0.5), stage], compile=compile, input_type="logits")
    assert repr(pipe) == "LogitsPipe(qkv[Temperature(temperature=0.5), UserStage(strength, cost)])"
    third, request = torch.arange(VOCAB) % 3 == 0, torch.arange(BATCH)[:, None]
    for strength in (None, 3.0, torch.rand(BATCH)):
        value = 2.0 if strength is None else strength if isinstance(strength, float) else strength[:, None].double()
        expected = torch.where(third, x.double() / 0.5 - value * cost.double(), x.double() / 0.5 + request)
        torch.testing.assert_close(pipe(x, cost=cost, strength=strength).double(), expected, rtol=1e-6, atol=1e-5)
    tokens = LogitsPipe([stage, Softmax(), TopP(0.8), Sample()], compile=compile)(x, cost=cost[:1], seed=[1] * BATCH)
    masked = LogitsPipe([stage])(x, cost=cost[:1])
    assert torch.equal(tokens, qkv.sample(masked, top_p=0.8, seed=1))
    # two of them, with a name in common
    twice = LogitsPipe([stage, UserStage(PENALTY, value="strength", tensor="cost", default=0.0)], compile=compile)
    first = LogitsPipe([stage])(x, cost=cost)
    torch.testing.assert_close(twice(x, cost=cost), torch.where(third, first, first + request), rtol=1e-6, atol=1e-6)


def test_what_is_wrong_in_c_is_told():
    x = torch.zeros(2, 5)
    with pytest.raises(qkv.CompileError, match="undeclared_thing"):
        LogitsPipe([UserStage(PENALTY.replace("token %", "undeclared_thing %"))])(x)
    refused("strength: expected", lambda: LogitsPipe([UserStage(PENALTY, value="strength")])(x))
    refused("cost: expected", lambda: LogitsPipe([UserStage(PENALTY, tensor="cost")])(x))
    refused("value_name: expected an identifier", lambda: LogitsPipe([UserStage(PENALTY, value="a b", default=1.0)])(x))
    refused("stages: expected 1 to 16", lambda: LogitsPipe([Temperature(1.0)] * 17, input_type="logits"))


def test_a_wrong_order_is_refused_when_the_pipe_is_made():
    for stages, text in (
        ([], "stages: expected one or more"),
        ([TopK], "stages[0]: expected a stage"),
        ([Softmax(), Temperature()], "stages[1]: Temperature() takes logits, got probs from Softm"),
        ([Temperature(), TopP(0.5)], "stages[1]: TopP(top_p=0.5) takes probs, got logits from"),
        ([Softmax(), Softmax()], "stages[1]: Softmax() takes logits, got probs"),
        ([MinP(), Softmax()], "stages[1]: Softmax() takes logits, got probs"),
        ([Softmax(), Sample(), TopK()], "stages[2]: TopK() takes logits or probs, got tokens from"),
        ([Softmax(), Bias()], "stages[1]: Bias() takes logits, got probs"),
        ([TypicalP(), Sample(), Greedy()], "stages[2]: Greedy() takes logits or probs, got tokens from"),
        ([TopK(), Sample()], "input_type: expected 'logits' or 'probs'"),
    ):
        refused(text, lambda stages=stages: LogitsPipe(stages))
    refused("stages[0]: Softmax() takes logits, got probs",
            lambda: LogitsPipe([Softmax()], input_type="probs"))
    refused("no such parameter", lambda: LogitsProcessor(depth=1))


def test_a_wrong_call_is_refused():
    x = torch.zeros(2, 5)
    pipe = LogitsPipe([Temperature(), Softmax(), TopP(0.5), Sample()])
    refused("temperature: expected", lambda: pipe(x, seed=1))
    refused("seed: expected", lambda: pipe(x, temperature=1.0))
    refused("min_p: no stage", lambda: pipe(x, temperature=1.0, seed=1, min_p=0.1))
    refused("rows: expected [batch, vocab]", lambda: pipe(x[0], temperature=1.0, seed=1))
    refused("rows: expected", lambda: pipe(x.double(), temperature=1.0, seed=1))
    refused("out: expected", lambda: LogitsPipe([Softmax()])(x, out=x[:1]))
    refused("counts: expected a tensor", lambda: LogitsPipe([Presence(1.0), Softmax()])(x))


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_values_out_of_range_name_the_row(compile, framework):
    as_array = torch.tensor if framework == "torch" else (lambda v: np.array(v, np.float32))
    x = as_array([[0.0, 1.0], [1.0, 0.0]])
    pipe = LogitsPipe([Temperature(), Softmax(), TopP(), MinP(), Sample()], compile=compile)
    good = dict(temperature=1.0, top_p=0.5, min_p=0.1, seed=1)
    for name, bad in (("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf),
                      ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1), ("min_p", 1.1)):
        refused(f"{name}[0]: expected", lambda: pipe(x, **{**good, name: bad}))
        value = as_array([good[name], bad])
        refused(f"{name}[1]: expected", lambda: pipe(x, **{**good, name: value}))
    with pytest.raises(ValueError):
        pipe(x, **{**good, "top_p": as_array([0.5, 0.5, 0.5])})


def test_on_a_device_the_tokens_are_those_of_the_cpu(device):
    x = torch.from_numpy(random_logits(13, 64, 1000))
    for compile in (True, False):
        pipe = LogitsPipe([Temperature(0.8), TopK(50), Softmax(), TopP(0.9), Sample()],
                          compile=compile)
        tokens = pipe(x.to(device), seed=21)
        assert tokens.device.type == device
        assert torch.equal(tokens.cpu(), pipe(x, seed=21))


@pytest.mark.gpu
def test_a_pipe_is_captured_into_a_graph():
    x = torch.randn(4, 1000, device="cuda")
    pipe = LogitsPipe([Temperature(0.7), TopK(50), Softmax(), TopP(0.9), Sample()])
    out = pipe(x, seed=5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pipe(x, seed=5, out=out)
    x.copy_(torch.randn(4, 1000, device="cuda"))
    graph.replay()
    assert torch.equal(out, pipe(x, seed=5))
