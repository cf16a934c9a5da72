"""What BatchAttention keeps from plan to plan: operators that grow, plans under capture, lengths that it may not
look into because they are on a GPU.

SPDX-License-Identifier: Apache-2.0
"""

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

import qkv
import qkv.attention
from batches import as_torch, check, make, plan, random_case
from conftest import refused
from qkv import batch_attention
from qkv.attention import BatchAttention


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
