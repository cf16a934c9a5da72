"""BatchAttention against attention in torch float64, written from the formula of qkv/attention.h.

SPDX-License-Identifier: Apache-2.0
"""

import math
import random
from types import SimpleNamespace

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

import qkv
import qkv.attention
from qkv import batch_attention
from qkv.attention import BatchAttention

from conftest import SEED

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Of o: storing it, and for 16 bits rounding probabilities for the tensor cores of a GPU.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


# ---- reference -----------------------------------------------------------------------------------


def rotate(x, positions, theta, scale):
    """RoPE of x [n, heads, dim] f64, pairs (i, i + dim/2)."""
    half = x.shape[-1] // 2
    freq = theta ** (-torch.arange(half, dtype=torch.float64) / half) / scale
    angle = positions.double()[:, None] * freq
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q, k, v, case, mask=None):
    """One request: q [m, Hq, D], k and v [n, Hk, D], all f64. Returns o, lse."""
    m, n = q.shape[0], k.shape[0]
    group = q.shape[1] // k.shape[1]
    j = torch.arange(n)
    p = torch.arange(m) + n - m
    if case.rope:
        q, k = rotate(q, p, *case.rope), rotate(k, j, *case.rope)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    x = torch.einsum("ihd,jhd->hij", q, k) * case.sm_scale
    if case.cap:
        x = case.cap * (x / case.cap).tanh()
    distance = j[None] - p[:, None]
    if case.alibi is not None:
        x = x + case.alibi.double()[:, None, None] * distance
    if case.logit is not None:
        x = case.logit(x, distance)
    seen = torch.ones(m, n, dtype=torch.bool)
    if case.causal:
        seen &= distance <= 0
    if case.left >= 0:
        seen &= distance >= -case.left
    if case.right >= 0:
        seen &= distance <= case.right
    if mask is not None:
        seen &= mask
    x = x.masked_fill(~seen, -math.inf)
    if case.sink is not None:
        x = torch.cat([x, case.sink.double()[:, None, None].expand(-1, m, 1)], -1)
        v = torch.cat([v, v.new_zeros(1, *v.shape[1:])])
    lse = x.logsumexp(-1)
    weight = (x - lse.nan_to_num(neginf=0)[..., None]).exp()
    return torch.einsum("hij,jhd->ihd", weight, v), lse.T


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
        mask = None if case.masks is None else case.masks[r]
        a, b = attend(q[rows].double(), keys.double(), values.double(), case, mask)
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


# ---- the grid ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", range(90))
def test_random_batches(number, device):
    case = random_case(number, device)
    base_2 = number % 3 == 0
    attention = BatchAttention(kv_layout=case.layout, lse_base_2=base_2)
    plan(attention, case, "padded", [None, as_torch, as_numpy][number % 3])
    o, lse = attention.run(case.q, (case.k, case.v))
    check(case, o, lse, base_2)
    plan(attention, case, "packed", [as_torch, as_numpy, None][number % 3])
    again, lse = attention.run(case.q, (case.k, case.v))
    check(case, again, lse, base_2)
    assert torch.equal(again, o)  # one and the same work


@pytest.mark.parametrize("dtype_kv", [torch.float8_e4m3fn, torch.int8, torch.float32])
def test_keys_and_values_of_another_dtype(dtype_kv):
    case = make(3, dtype=torch.float16, causal=True)
    scale = 0.04 if dtype_kv == torch.int8 else 0.5
    k, v = ((x.float() / scale).nan_to_num() for x in (case.k, case.v))
    if dtype_kv == torch.int8:
        k, v = k.round(), v.round()
    k, v = k.to(dtype_kv), v.to(dtype_kv)
    attention = BatchAttention()
    plan(attention, case)
    o, lse = attention.run(case.q, (k, v), k_scale=scale, v_scale=scale)
    assert o.dtype == torch.float16
    torch.testing.assert_close(o.double(), case.o, atol=0.1, rtol=0.1)
    plan(attention, case, dtype_q="f16", dtype_kv=dtype_kv, dtype_o=torch.float32)
    per_head = torch.full((2,), scale)
    o32, _ = attention.run(case.q, (k, v), k_scale=per_head, v_scale=per_head)
    assert o32.dtype == torch.float32
    torch.testing.assert_close(o32, o.float(), atol=2e-3, rtol=2e-3)


def test_numpy_all_the_way():
    case = make(4, causal=True)
    attention = BatchAttention("cutlass")
    attention.plan(as_numpy(case.qo_offsets), as_numpy(case.kv_lens), as_numpy(case.padded),
                   4, 2, 64, 64, causal=True)
    o, lse = attention.run(case.q.numpy(), (case.k.numpy(), case.v.numpy()))
    assert isinstance(o, np.ndarray) and isinstance(lse, np.ndarray)
    check(case, torch.from_numpy(o), torch.from_numpy(lse))


def test_jax_all_the_way():
    jax = pytest.importorskip("jax")
    case = make(4, causal=True)
    q, k, v = (jax.numpy.asarray(x.numpy()) for x in (case.q, case.k, case.v))
    for table in ("padded", "packed"):
        attention = BatchAttention(device="cpu")
        plan(attention, case, table, lambda x: jax.numpy.asarray(as_numpy(x)))
        o, lse = attention.run(q, (k, v))
        assert isinstance(o, jax.Array) and isinstance(lse, jax.Array)
        check(case, *(torch.from_numpy(np.array(x)) for x in (o, lse)))


# ---- forms of tables -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_page_size_is_that_of_the_first_run(device):
    for page_size, layout in ((1, "NHD"), (5, "HND"), (16, "NHD")):
        case = make(5, page_size=page_size, layout=layout, causal=True, device=device)
        attention = BatchAttention(kv_layout=layout)
        for _ in range(2):
            plan(attention, case, page_size=None)
            check(case, *attention.run(case.q, (case.k, case.v)))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_packed_table_without_page_size_means_tokens(layout):
    case = make(6, page_size=1, layout=layout, causal=True)
    attention = BatchAttention(kv_layout=layout)
    plan(attention, case, "packed", as_torch, page_size=None)
    check(case, *attention.run(case.q, (case.k, case.v)))
    # A pool of tokens needs no axis of pages.
    axis = 1 if layout == "NHD" else 2
    check(case, *attention.run(case.q, (case.k.squeeze(axis), case.v.squeeze(axis))))


def test_keys_and_values_in_one_array():
    case = make(7, causal=True)
    attention = BatchAttention()
    plan(attention, case, page_size=None)
    both = torch.stack([case.k, case.v], 1)
    check(case, *attention.run(case.q, both))
    plan(attention, case)
    check(case, *attention.run(case.q, (both,)[0]))


def test_without_a_table_keys_follow_each_other():
    case = make(8, page_size=1, causal=True)
    k, v = (x[case.packed].squeeze(1) for x in (case.k, case.v))
    attention = BatchAttention()
    attention.plan(case.qo_offsets, case.kv_lens, None, 4, 2, 64, causal=True)
    check(case, *attention.run(case.q, (k, v)))


def test_i64_arrays_are_taken():
    case = make(9, causal=True)
    attention = BatchAttention()
    plan(attention, case, "padded", lambda x: torch.tensor(x))
    check(case, *attention.run(case.q, (case.k, case.v)))
    plan(attention, case, "packed", np.array)
    check(case, *attention.run(case.q, (case.k, case.v)))


@pytest.mark.parametrize("table", ["padded", "packed"])
@pytest.mark.parametrize("convert", [None, as_torch, as_numpy])
def test_host_arrays_are_free_after_plan(table, convert):
    case = make(10, causal=True)
    arrays = [(convert or list)(x) for x in
              (case.qo_offsets, case.kv_lens, [list(t) for t in case.padded] if table == "padded"
               else case.packed)]
    attention = BatchAttention()
    attention.plan(*arrays, 4, 2, 64, page_size=4, causal=True)
    for x in arrays:  # the plan waits for the first run, which says dtypes and the device
        for i in range(len(x)):
            if isinstance(x[i], list):
                x[i][:] = [0] * len(x[i])
            else:
                x[i] = 0
    check(case, *attention.run(case.q, (case.k, case.v)))


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("qo_lens, kv_lens", [
    ((), ()), ((0,), (0,)), ((1,), (0,)), ((0,), (9,)), ((3,), (1,)), ((1, 0, 2), (0, 4, 2)),
    ((1,), (1,)), ((4,), (4,)), ((1, 1), (4, 5)), ((4, 5), (8, 9)),
])
def test_empty_requests_and_page_boundaries(qo_lens, kv_lens, device):
    for causal in (False, True):
        case = make(11, qo_lens, kv_lens, causal=causal, device=device)
        for table in ("padded", "packed"):
            attention = BatchAttention()
            plan(attention, case, table)
            check(case, *attention.run(case.q, (case.k, case.v)))


def test_more_rows_than_planned_are_left_alone():
    case = make(12, causal=True)
    attention = BatchAttention()
    plan(attention, case)
    q = torch.cat([case.q, torch.full((3, 4, 64), math.nan)])
    out, lse = torch.full((11, 4, 64), 7.0), torch.full((11, 4), 7.0)
    a, b = attention.run(q, (case.k, case.v), out=out, lse=lse)
    assert a is out and b is lse
    check(case, out[:8], lse[:8])
    assert (out[8:] == 7).all() and (lse[8:] == 7).all()


# ---- features ------------------------------------------------------------------------------------


def test_each_layer_may_have_its_own_values():
    attention = BatchAttention()
    case = make(13, causal=True, cap=30.0, left=20, sink=torch.zeros(4), alibi=torch.zeros(4))
    plan(attention, case, sink=True, alibi_slopes=True)
    for layer in range(3):
        options = dict(causal=True, cap=5.0 * (layer + 1), left=4 * layer, sm_scale=0.1 + layer,
                       sink=torch.randn(4), alibi=torch.rand(4))
        case = make(13, **options)
        o, lse = attention.run(
            case.q, (case.k, case.v), logits_soft_cap=case.cap, window_left=case.left,
            sm_scale=case.sm_scale, sink=case.sink, alibi_slopes=case.alibi,
        )
        check(case, o, lse)


def test_a_feature_that_needs_values_asks_for_them():
    case = make(13)
    attention = BatchAttention()
    plan(attention, case, sink=True)
    with pytest.raises(ValueError, match="sink"):
        attention.run(case.q, (case.k, case.v))


@pytest.mark.parametrize("device", DEVICES)
def test_custom_masks_in_every_form(device):
    qo_lens, kv_lens = (3, 0, 1, 9), (9, 5, 1, 17)
    g = torch.Generator().manual_seed(1)
    masks = [torch.rand(m, n, generator=g) < 0.5 for m, n in zip(qo_lens, kv_lens)]
    case = make(14, qo_lens, kv_lens, masks=masks, device=device)
    flat = torch.cat([m.reshape(-1) for m in masks])
    packed = [np.packbits(m.numpy().reshape(-1), bitorder="little") for m in masks]
    bits = torch.from_numpy(np.concatenate(packed))
    indptr = torch.tensor(np.cumsum([0, *map(len, packed)]), dtype=torch.int64)
    forms = {
        "a list": masks, "flat each": [m.reshape(-1) for m in masks], "flat": flat,
        "NumPy": [m.numpy() for m in masks], "flat NumPy": flat.numpy(),
        "lists": [m.tolist() for m in masks], "a flat list": flat.tolist(),
        "packed": (bits, indptr), "packed NumPy": (bits.numpy(), indptr.numpy()),
        "on the device": flat.to(device), "packed on the device": (bits.to(device), indptr),
    }
    attention = BatchAttention()
    for why, form in forms.items():
        plan(attention, case, custom_mask=form)
        o, lse = attention.run(case.q, (case.k, case.v))
        check(case, o, lse)
    both = make(14, qo_lens, kv_lens, masks=masks, causal=True, device=device)
    plan(attention, both)
    check(both, *attention.run(both.q, (both.k, both.v)))


def test_custom_masks_of_a_wrong_size_are_refused():
    case = make(15)
    attention = BatchAttention()
    sizes = [m * n for m, n in zip(case.qo_lens, case.kv_lens)]
    for form, text in (
        (torch.ones(sum(sizes) - 1, dtype=torch.bool), "custom_mask: expected 98 entries"),
        ([torch.ones(n, dtype=torch.bool) for n in sizes[:2]], "custom_mask: expected 3 masks"),
        ([torch.ones(n + (r == 1), dtype=torch.bool) for r, n in enumerate(sizes)],
         "custom_mask[1]: expected 25 entries"),
        (torch.ones(sum(sizes)), "custom_mask[0]: expected bool"),
    ):
        refused(text, lambda: plan(attention, case, custom_mask=form))


def test_rope_as_a_record():
    case = make(16, causal=True, rope=(10000.0, 1.0))
    attention = BatchAttention()
    plan(attention, case, pos_encoding=qkv.Rope())
    check(case, *attention.run(case.q, (case.k, case.v)))
    plain = make(16, causal=True)
    plan(attention, plain, pos_encoding="NONE")
    check(plain, *attention.run(plain.q, (plain.k, plain.v)))


SLOPED = """
#define VARIANT_LOGIT 1
QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)
{
    const float slope = v->slopes.data[pos.qo_head * v->slopes.stride[0]];
    return logit + v->strength * slope * (float)(pos.kv_pos - pos.qo_pos) + (float)v->shift;
}
"""
UNNORMALISED = """
#define VARIANT_NO_SOFTMAX 1
#define VARIANT_LOGIT 1
QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)
{
    (void)v;
    (void)pos;
    return qi_sigmoid(logit);
}
"""


@pytest.mark.parametrize("device", DEVICES)
def test_a_variant_with_parameters_by_name(device):
    params = ("slopes", "f32", 1), ("strength", "f32"), ("shift", "i32")
    variant = qkv.Variant("sloped", SLOPED, params)
    slopes = torch.rand(4)

    def logit(strength, shift):
        return lambda x, distance: x + strength * slopes.double()[:, None, None] * distance + shift

    attention = BatchAttention()
    case = make(17, causal=True, logit=logit(0.5, 1), device=device)
    plan(attention, case, variant=variant, slopes=slopes.to(device), strength=0.5, shift=1)
    check(case, *attention.run(case.q, (case.k, case.v)))
    case = make(17, causal=True, logit=logit(0.25, -2), device=device)
    check(case, *attention.run(case.q, (case.k, case.v), strength=0.25, shift=-2))
    plan(attention, case, variant=variant, strength=0.25, shift=-2)
    check(case, *attention.run(case.q, (case.k, case.v), slopes=slopes.to(device)))
    with pytest.raises(TypeError, match="slopes"):
        attention.run(case.q, (case.k, case.v))
    with pytest.raises(TypeError, match="strenght"):
        plan(attention, case, variant=variant, strenght=1)
    with pytest.raises(TypeError, match="strenght"):
        attention.run(case.q, (case.k, case.v), slopes=slopes.to(device), strenght=1)


def test_a_variant_without_softmax_has_no_lse():
    case = make(18)
    attention = BatchAttention()
    plan(attention, case, variant=qkv.Variant("sigmoid", UNNORMALISED))
    o, lse = attention.run(case.q, (case.k, case.v))
    assert lse is None
    for r in range(3):
        rows = slice(case.qo_offsets[r], case.qo_offsets[r + 1])
        keys, values = (
            x[case.tables[r]].reshape(-1, 2, 64)[: case.kv_lens[r]].repeat_interleave(2, 1).double()
            for x in (case.k, case.v)
        )
        x = torch.einsum("ihd,jhd->hij", case.q[rows].double(), keys) / 8
        want = torch.einsum("hij,jhd->ihd", x.sigmoid(), values)
        torch.testing.assert_close(o[rows].double(), want, atol=1e-4, rtol=1e-4)


def test_lse_may_be_left_out():
    case = make(19)
    attention = BatchAttention()
    plan(attention, case)
    o, lse = attention.run(case.q, (case.k, case.v), lse=False)
    assert lse is None
    check(case, o, case.lse)


# ---- operators are kept --------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """The limits of each operator that is made."""
    made = []
    operator = qkv.attention.Attention

    def attention(**options):
        made.append(options)
        return operator(**options)

    monkeypatch.setattr(qkv.attention, "Attention", attention)
    return made


def test_operators_are_made_once(made):
    attention = BatchAttention()
    for step in range(50):
        kv_lens = (20 + step, 3 + step)
        decode = make(step, (1, 1), kv_lens, causal=True)
        plan(attention, decode)
        check(decode, *attention.run(decode.q, (decode.k, decode.v)))
        prefill = make(step, (3, 1 + step), kv_lens, causal=True)
        plan(attention, prefill)
        check(prefill, *attention.run(prefill.q, (prefill.k, prefill.v)))
    assert [options["max_qo_len"] for options in made] == [1, 0]
    for scale in (0.1, 0.2):
        case = make(1, (2, 2), causal=True, kv_lens=(5, 5), sm_scale=scale)
        plan(attention, case)
        check(case, *attention.run(case.q, (case.k, case.v)))
    assert len(made) == 2
    capped = [make(1, causal=True, cap=cap) for cap in (2.0, 3.0)]
    for case in capped:
        plan(attention, case)
        check(case, *attention.run(case.q, (case.k, case.v)))
    assert len(made) == 3


def test_limits_grow_by_doubling(made):
    attention = BatchAttention()
    for kv_len in range(1000, 9000, 250):
        case = make(kv_len, (1, 1), (kv_len, 1), heads=(1, 1), dim=8, page_size=16)
        plan(attention, case)
        check(case, *attention.run(case.q, (case.k, case.v)))
    assert [options["max_kv_len"] for options in made] == [1024, 2048, 4096, 8192, 16384]
    for small in ((1,), (4,)):
        case = make(1, small, small, heads=(1, 1), dim=8, page_size=16)
        plan(attention, case)
        check(case, *attention.run(case.q, (case.k, case.v)))
    assert len(made) == 6  # the first one with several rows a request


def test_capacity_is_what_is_made(made):
    attention = BatchAttention(max_requests=3, max_tokens=40, max_kv_len=99, max_pages=77)
    case = make(20, causal=True)
    plan(attention, case)
    check(case, *attention.run(case.q, (case.k, case.v)))
    limits = [made[0][name] for name in ("max_requests", "max_tokens", "max_kv_len", "max_pages")]
    assert limits == [3, 40, 99, 77]
    case = make(20, (1, 5, 2, 1), (7, 5, 33, 200), causal=True)  # more than was said: grows
    plan(attention, case)
    check(case, *attention.run(case.q, (case.k, case.v)))
    assert [made[1][name] for name in ("max_requests", "max_kv_len")] == [4, 256]


def test_growing_under_capture_is_an_error_that_says_so(monkeypatch):
    attention = BatchAttention(max_requests=4, max_tokens=16, max_kv_len=64, max_pages=64)
    case = make(21, causal=True)
    plan(attention, case)
    check(case, *attention.run(case.q, (case.k, case.v)))
    monkeypatch.setattr(batch_attention, "_capturing", lambda device: True)
    plan(attention, case)
    check(case, *attention.run(case.q, (case.k, case.v)))
    longer = make(21, (1,), (65,), causal=True)
    with pytest.raises(RuntimeError, match="max_kv_len.*65.*capture"):
        plan(attention, make(21, (1, 2), (65, 9), causal=True))
    check(case, *attention.run(case.q, (case.k, case.v)))  # the former plan is in force
    with pytest.raises(RuntimeError, match="capture"):
        plan(attention, longer)


def test_a_failed_plan_leaves_the_former_one():
    case = make(22, causal=True)
    attention = BatchAttention()
    plan(attention, case)
    check(case, *attention.run(case.q, (case.k, case.v)))
    wrong = make(22, causal=True)
    wrong.packed[0] = -1
    with pytest.raises(ValueError, match="kv_indices"):
        plan(attention, wrong, "packed")
    check(case, *attention.run(case.q, (case.k, case.v)))


def test_objects_do_not_disturb_each_other():
    a, b = BatchAttention(), BatchAttention()
    one, two = make(23, causal=True), make(24, (2, 2), (9, 3), causal=True)
    plan(a, one)
    plan(b, two)
    check(one, *a.run(one.q, (one.k, one.v)))
    check(two, *b.run(two.q, (two.k, two.v)))
    check(one, *a.run(one.q, (one.k, one.v)))


# ---- refusals ------------------------------------------------------------------------------------


def refused(text, call, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    assert text in str(error.value), str(error.value)


def test_names_of_backends_are_hints():
    for name in ("auto", "cutlass", "fa2", "fa3", "trtllm-gen", "cudnn", "cpu"):
        BatchAttention(name)
    refused("backend: expected one of auto", lambda: BatchAttention("fa9"))
    refused("kv_layout: expected 'NHD'", lambda: BatchAttention(kv_layout="DHN"))
    refused("max_tokens: expected", lambda: BatchAttention(max_tokens=-1))


def test_what_is_wrong_with_a_plan_is_named():
    attention = BatchAttention()
    good = dict(qo_offsets=[0, 1, 3], kv_lens=[4, 5], kv_block_table=[[0], [1]],
                num_qo_heads=4, num_kv_heads=2, head_dim_qk=64)
    for change, text in (
        (dict(num_qo_heads=3), "num_qo_heads: expected a multiple of num_kv_heads (2), got 3"),
        (dict(num_qo_heads=0), "num_qo_heads: expected an integer, 1 or more, got 0"),
        (dict(num_kv_heads=2.0), "num_kv_heads: expected an integer"),
        (dict(qo_offsets=[0, 1]), "qo_offsets: expected 3 entries for the 2 requests of kv_lens"),
        (dict(qo_offsets=[1, 1, 3]), "qo_offsets: expected a first entry of 0, got 1"),
        (dict(qo_offsets=[0, 3, 1]), "qo_offsets: expected entries that do not fall (request 1)"),
        (dict(qo_offsets=np.zeros((2, 2), np.int32)), "qo_offsets: expected a list or 1-D array"),
        (dict(qo_offsets=torch.tensor([0.0, 1.0, 3.0])), "qo_offsets: expected a list or 1-D"),
        (dict(kv_lens=[4, -5]), "kv_lens: expected >= 0, got -5 (request 1)"),
        (dict(kv_block_table=[[0]]), "kv_block_table: expected 2 rows, one a request, got 1"),
        (dict(kv_block_table=torch.zeros(2, 1)), "kv_block_table: expected i32, got torch.float32"),
        (dict(kv_block_table=as_torch([[[0]], [[1]]])), "kv_block_table: expected [pages] or [req"),
        (dict(kv_block_table=torch.tensor([[1 << 31], [0]])), "kv_block_table: expected values"),
        (dict(page_size=0), "page_size: expected an integer, 1 or more"),
        (dict(kv_block_table=None, page_size=4), "page_size: expected None without kv_block_table"),
        (dict(window_left=-2), "window_left: expected an integer, -1 or more"),
        (dict(pos_encoding="alibi"), "pos_encoding: expected None, 'none', 'rope'"),
    ):
        refused(text, lambda: attention.plan(**{**good, **change}))
    refused("'casual' is not an argument", lambda: attention.plan(**good, casual=True), TypeError)
    case = make(25, (1, 2), (4, 5))
    refused("run: expected a plan", lambda: BatchAttention().run(case.q, (case.k, case.v)))

    def run(**change):
        attention = BatchAttention()
        attention.plan(**{**good, **change})
        attention.run(case.q, (case.k, case.v))

    refused("kv_block_table: expected 2 pages for the 5 keys of request 1, got 1", run)
    refused("kv_block_table: expected at least 9 pages", lambda: run(kv_block_table=[0, 1, 2]))
    refused("head_dim_qk", lambda: run(head_dim_qk=63, kv_block_table=[[0, 0], [1, 2]]))
    refused("window_left", lambda: (
        attention.plan(**{**good, "kv_block_table": [[0, 0], [1, 2]], "window_left": 3}),
        attention.run(case.q, (case.k, case.v), window_left=4)))


# ---- lengths that plan may not look into: what is done about them needs no GPU -------------------


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Tensors are taken for a GPU's, while operators of the CPU compute. Records their plans."""
    plans = []
    operator = qkv.attention.Attention

    class Attention:
        def __init__(self, device, **options):
            assert device == "cuda:0"
            self.limits = options
            self.attention = operator(device="cpu", **options)

        def plan(self, max_tokens=0, **arrays):
            assert not any(isinstance(x, list) for x in arrays.values())
            plans.append((self, max_tokens))
            if int(arrays["qo_indptr"][-1]) <= max_tokens:  # else a GPU's plan is empty
                self.attention.plan(**arrays)

        def run(self, *tensors, **values):
            return self.attention.run(*tensors, **values)

        def status(self, stream=None):
            pass

    monkeypatch.setattr(qkv.attention, "Attention", Attention)
    monkeypatch.setattr(batch_attention, "_capturing", lambda device: False)
    monkeypatch.setattr(
        batch_attention, "_device_of", lambda x: "cpu" if isinstance(x, list) else "cuda:0"
    )
    monkeypatch.setattr(
        batch_attention, "_to_device",
        lambda x, device, dtype: torch.as_tensor(x, dtype=getattr(torch, dtype)),
    )
    return plans


@pytest.mark.parametrize("table", ["padded", "packed"])
def test_lengths_on_a_gpu_are_planned_for_the_rows_of_q(table, pretended_gpu):
    attention = BatchAttention()
    big, small = make(40, causal=True), make(41, (1, 2), (5, 9), causal=True)
    for case in (big, big, small, big):
        plan(attention, case, table, as_torch)
        check(case, *attention.run(case.q, (case.k, case.v)))
        check(case, *attention.run(case.q, (case.k, case.v)))
    # The first plan waits for its run. Each later one is at once in force for what the operator has
    # room for, as a graph may be replayed without a run, and again for the rows that q has.
    assert [rows for _, rows in pretended_gpu] == [8, 64, 8, 64, 3, 64, 8]
    assert len({id(made) for made, _ in pretended_gpu}) == 1
    many = make(42, (70, 30), (70, 40), causal=True)
    plan(attention, many, table, as_torch)
    check(many, *attention.run(many.q, (many.k, many.v)))
    assert pretended_gpu[-1][0].limits["max_tokens"] == 128
    attention.status()


@pytest.mark.parametrize("table", ["padded", "packed"])
def test_lengths_on_a_gpu_are_planned_once_where_the_rows_are_said(table, pretended_gpu):
    attention = BatchAttention(max_requests=3, max_tokens=20, max_kv_len=50, max_pages=30)
    case = make(43, (1, 1, 0), (7, 9, 0), causal=True)
    for step in range(2):
        plan(attention, case, table, as_torch, num_tokens=2, max_qo_len=1, dtype_q="f32",
             dtype_kv="f32")
        assert len(pretended_gpu) == step + 1
        check(case, *attention.run(case.q, (case.k, case.v)))
    made, rows = pretended_gpu[-1]
    assert len(pretended_gpu) == 2 and rows == 2
    names = ("max_requests", "max_tokens", "max_kv_len", "max_pages", "max_qo_len")
    assert [made.limits[name] for name in names] == [3, 20, 50, 30, 1]


def test_lengths_on_a_gpu_with_masks_and_without_tables(pretended_gpu):
    masks = [torch.rand(m, n) < 0.5 for m, n in ((3, 5), (1, 9))]
    case = make(44, (3, 1), (5, 9), masks=masks)
    attention = BatchAttention()
    plan(attention, case, "padded", as_torch)  # a list of masks says their sizes
    check(case, *attention.run(case.q, (case.k, case.v)))
    refused("custom_mask: expected a list of masks, or bits and indptr", lambda: plan(
        attention, case, "padded", as_torch, custom_mask=torch.cat([m.reshape(-1) for m in masks])))
    case = make(45, page_size=1, causal=True)
    k, v = (x[case.packed].squeeze(1) for x in (case.k, case.v))
    qo, lens = as_torch(case.qo_offsets), as_torch(case.kv_lens)
    attention = BatchAttention()
    attention.plan(qo, lens, None, 4, 2, 64, causal=True)
    refused("max_kv_len: expected", lambda: attention.run(case.q, (k, v)))
    attention = BatchAttention(max_kv_len=40)
    attention.plan(qo, lens, None, 4, 2, 64, causal=True)
    check(case, *attention.run(case.q, (k, v)))
    refused("expected all on the host or all on one GPU", lambda: attention.plan(
        qo, case.kv_lens, None, 4, 2, 64))
    refused("qo_offsets, kv_lens: expected [requests + 1]", lambda: attention.plan(
        qo[None], lens, None, 4, 2, 64))


# ---- on a GPU ------------------------------------------------------------------------------------


def on_gpu(x):
    return torch.tensor(x, dtype=torch.int32, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("table", ["padded", "packed"])
@pytest.mark.parametrize("number", range(20))
def test_lengths_and_tables_on_the_gpu(number, table):
    case = random_case(number, "cuda")
    options = {}
    if case.masks is not None:
        packed = [np.packbits(m.numpy().reshape(-1), bitorder="little") for m in case.masks]
        bits = torch.from_numpy(np.concatenate(packed)).cuda()
        indptr = torch.tensor(np.cumsum([0, *map(len, packed)]), dtype=torch.int64).cuda()
        options["custom_mask"] = bits, indptr
    attention = BatchAttention(kv_layout=case.layout)
    for _ in range(2):
        plan(attention, case, table, on_gpu, **options)
        check(case, *attention.run(case.q, (case.k, case.v)))
        attention.status()
    # The next step has fewer rows, the same operator.
    small = make(number, (1,), (5,), case.heads, case.dim, case.dim_vo, page_size=case.page_size,
                 layout=case.layout, dtype=case.dtype, device="cuda")
    plan(attention, small, table, on_gpu)
    check(small, *attention.run(small.q, (small.k, small.v)))
    attention.status()


@pytest.mark.gpu
def test_arrays_of_two_devices_are_refused():
    case = make(26, device="cuda")
    refused("expected all on the host or all on one GPU", lambda: BatchAttention().plan(
        on_gpu(case.qo_offsets), case.kv_lens, case.padded, 4, 2, 64))


@pytest.mark.gpu
def test_a_graph_replays_with_lengths_that_changed_in_place():
    slots, columns, tokens = 4, 8, 16
    steps = [
        make(seed, qo_lens, kv_lens, causal=True, device="cuda", dtype=torch.bfloat16)
        for seed, (qo_lens, kv_lens) in enumerate((
            ((1, 3, 1, 2), (7, 9, 4, 30)), ((1, 3, 0, 0), (8, 12, 0, 0)),
            ((1, 1, 5, 0), (32, 3, 16, 0)),
        ))
    ]
    qo, lens = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (slots + 1, slots))
    tables = torch.zeros(slots, columns, dtype=torch.int32, device="cuda")
    q = torch.zeros(tokens, 4, 64, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.zeros(40, 4, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def load(case):
        qo.copy_(torch.tensor(case.qo_offsets, dtype=torch.int32))
        lens.copy_(torch.tensor(case.kv_lens, dtype=torch.int32))
        for r, table in enumerate(case.tables):
            tables[r, : len(table)] = torch.tensor(table, dtype=torch.int32, device="cuda")
        q[: case.q.shape[0]] = case.q
        k[: case.k.shape[0]] = case.k
        v[: case.v.shape[0]] = case.v

    attention = BatchAttention(max_requests=slots, max_tokens=tokens, max_kv_len=32, max_pages=64)

    def step():
        attention.plan(qo, lens, tables, 4, 2, 64, causal=True, page_size=4, num_tokens=tokens,
                       dtype_q=q.dtype, dtype_kv=q.dtype)
        return attention.run(q, (k, v))

    load(steps[0])
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = step()
    for case in [*steps, steps[0]]:
        load(case)
        o.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        rows = case.qo_offsets[-1]
        check(case, o[:rows], lse[:rows])
        assert (o[rows:] == 7).all()
    with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attention.plan(qo, lens, tables, 4, 2, 64, causal=True, page_size=4, num_tokens=tokens + 1,
                       dtype_q=q.dtype, dtype_kv=q.dtype)


@pytest.mark.gpu
def test_a_graph_of_runs_replays_with_plans_of_the_host():
    attention = BatchAttention(max_requests=4, max_tokens=16, max_kv_len=64, max_pages=64,
                               device="cuda")
    cases = [make(30 + s, (1, 1), kv, causal=True, device="cuda") for s, kv in
             enumerate([(7, 30), (64, 1), (5, 5)])]
    q, k, v = (torch.zeros(n, *x.shape[1:], device="cuda") for n, x in
               ((2, cases[0].q), (40, cases[0].k), (40, cases[0].v)))

    def load(case):
        for static, x in ((q, case.q), (k, case.k), (v, case.v)):
            static[: x.shape[0]] = x

    load(cases[0])
    plan(attention, cases[0])
    attention.run(q, (k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = attention.run(q, (k, v))
    for case in [*cases, cases[0]]:
        load(case)
        plan(attention, case)
        graph.replay()
        torch.cuda.synchronize()
        check(case, o, lse)
