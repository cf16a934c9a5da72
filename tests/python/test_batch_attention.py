"""BatchAttention against attention in torch float64: lengths, tables, features, refusals.

SPDX-License-Identifier: Apache-2.0
"""

import math

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

import qkv
from batches import as_numpy, as_torch, check, make, plan, random_case
from conftest import refused
from qkv.attention import BatchAttention


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
    check(case, *attention.run(case.q, both))


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


# ---- refusals ------------------------------------------------------------------------------------


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
