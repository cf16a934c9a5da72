"""Attention through Python against float64: index forms, masks, levels, blocks, variants, and what else a run takes."""

import functools

import pytest
import reference
import torch
from conftest import close
from test_native import rope_reference

import qkv
from qkv.attention import Attention, can_run, merge, workspace_size

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 4
BASE = dict(
    num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim_qk=DIM, dtype_q="f32", max_requests=8, max_tokens=64, max_kv_len=256, max_pages=128
)
# New rows and keys of each request: none, one token, a page exactly, one past it, rows that see no key, many.
LENGTHS = [(0, 5), (1, 1), (3, PAGE), (2, PAGE + 1), (4, 2), (7, 41)]


causal = functools.partial(reference.visible, right=0)


class Batch:
    """Random requests whose keys lie in pages of a pool that is NaN elsewhere."""

    def __init__(self, lengths=LENGTHS, dtype=torch.float32, device="cpu", layout="NHD"):
        self.lengths, self.device = lengths, device
        rows = [rows for rows, _ in lengths]
        self.q = torch.randn(sum(rows), HEADS, DIM).to(dtype)
        self.k, self.v = ([torch.randn(keys, KV_HEADS, DIM).to(dtype) for _, keys in lengths] for _ in range(2))
        pages = [-(-keys // PAGE) for _, keys in lengths]
        order = torch.randperm(sum(pages) + 3)[: sum(pages)].int()
        self.pool = torch.full((sum(pages) + 3, 2, PAGE, KV_HEADS, DIM), torch.nan).to(dtype)
        self.tables = list(order.split(pages))
        for table, k, v in zip(self.tables, self.k, self.v):
            for half, x in enumerate((k, v)):
                for i, page in enumerate(table.tolist()):
                    part = x[i * PAGE : (i + 1) * PAGE]
                    self.pool[page, half, : len(part)] = part
        if layout == "HND":
            self.pool = self.pool.transpose(2, 3).contiguous()
        self.q, self.pool = self.q.to(device), self.pool.to(device)
        self.qo_indptr = torch.tensor([0, *rows]).cumsum(0).int()
        self.kv_lens = torch.tensor([keys for _, keys in lengths]).int()

    def index(self, form):
        if form == "csr":
            return dict(
                qo_indptr=self.qo_indptr,
                kv_indptr=torch.tensor([0, *map(len, self.tables)]).cumsum(0).int(),
                kv_indices=torch.cat(self.tables),
                kv_last_page_len=(self.kv_lens - 1) % PAGE + 1,
            )
        width = max(map(len, self.tables))
        table = torch.stack([torch.nn.functional.pad(t, (0, width - len(t)), value=-1) for t in self.tables])
        return dict(qo_indptr=self.qo_indptr, block_table=table, kv_lens=self.kv_lens)

    def check(self, got, expected, scale=4):
        """expected(i) is the (o, lse) of request i."""
        o, lse = got
        for i, (begin, end) in enumerate(zip(self.qo_indptr.tolist(), self.qo_indptr.tolist()[1:])):
            o_ref, lse_ref = expected(i)
            close(o[begin:end], o_ref, scale=scale)
            close(lse[begin:end], lse_ref, scale=max(scale, 4))

    def reference(self, i, q=None, k=None, v=None, **options):
        rows = slice(self.qo_indptr[i], self.qo_indptr[i + 1])
        return reference.attention((self.q if q is None else q)[rows], (self.k if k is None else k)[i], (self.v if v is None else v)[i], **options)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["csr", "table", "lists", "on the device"])
def test_paged(form, layout, dtype, device):
    batch = Batch(dtype=dtype, device=device, layout=layout)
    attention = Attention(**BASE | dict(dtype_q=dtype), page_size=PAGE, kv_layout=layout, device=device)
    index = batch.index("csr" if form in ("csr", "lists") else "table")
    if form == "lists":
        index = {name: array.tolist() for name, array in index.items()}
    elif form == "on the device":
        index = {name: array.to(device) for name, array in index.items()}
        index |= dict(max_tokens=len(batch.q) if device == "cuda" else 0)
    attention.plan(**index)
    expected = lambda i: batch.reference(i, allowed=causal(*batch.lengths[i]))
    got = attention.run(batch.q, batch.pool[:, 0], batch.pool[:, 1], lse=True)
    batch.check(got, expected)
    attention.status()
    o, lse = (torch.empty_like(x) for x in got)
    both = attention.run(batch.q, batch.pool, o=o, lse=lse)  # K and V in one array
    assert both[0] is o and both[1] is lse
    assert torch.equal(o, got[0]) and torch.equal(lse, got[1])
    assert torch.equal(attention.run(batch.q, batch.pool), o)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_ragged(layout):
    batch = Batch()
    attention = Attention(**BASE, kv_layout=layout)
    attention.plan(qo_indptr=batch.qo_indptr, kv_indptr=torch.tensor([0, *(keys for _, keys in LENGTHS)]).cumsum(0).int())
    k, v = torch.cat(batch.k), torch.cat(batch.v)
    if layout == "HND":
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    batch.check(attention.run(batch.q, k, v, lse=True), lambda i: batch.reference(i, allowed=causal(*LENGTHS[i])))


def test_no_requests_and_no_rows():
    attention = Attention(**BASE, page_size=PAGE)
    pool = torch.full((1, 2, PAGE, KV_HEADS, DIM), torch.nan)
    attention.plan(qo_indptr=[0], block_table=torch.empty(0, 0, dtype=torch.int32), kv_lens=[])
    assert attention.run(torch.empty(0, HEADS, DIM), pool).shape == (0, HEADS, DIM)
    attention.plan(qo_indptr=[0, 2], block_table=[[0]], kv_lens=[0])  # rows without keys
    o, lse = attention.run(torch.randn(2, HEADS, DIM), pool, lse=True)
    assert (o == 0).all() and (lse == -torch.inf).all()


def test_scale_soft_cap_window_and_their_values_of_a_layer():
    batch = Batch()
    attention = Attention(**BASE, page_size=PAGE, sm_scale=0.3, logits_soft_cap=5.0, window_left=9, window_right=0)
    attention.plan(**batch.index("csr"))

    def expected(scale, cap, left):
        return lambda i: batch.reference(i, allowed=causal(*LENGTHS[i], left), sm_scale=scale, soft_cap=cap)

    batch.check(attention.run(batch.q, batch.pool, lse=True), expected(0.3, 5.0, 9))
    batch.check(attention.run(batch.q, batch.pool, lse=True, sm_scale=0.5, logits_soft_cap=2.0, window=(3, 0)), expected(0.5, 2.0, 3))
    with pytest.raises(qkv.InvalidError, match="window"):
        attention.run(batch.q, batch.pool, window=(50, 0))
    with pytest.raises(qkv.InvalidError, match=r"window: expected \(left, right\)"):
        attention.run(batch.q, batch.pool, window=(1,))


def test_alibi_sink_and_base_2():
    batch = Batch()
    slopes, sink = torch.rand(HEADS), torch.randn(HEADS)
    attention = Attention(**BASE, page_size=PAGE, alibi=True, sink=True, lse_base_2=True, only_appends=True)
    attention.plan(**batch.index("table"))
    o, lse = attention.run(batch.q, batch.pool, lse=True, alibi_slopes=slopes, sink=sink.tolist())

    def expected(i):
        return batch.reference(i, allowed=causal(*LENGTHS[i]), slopes=slopes, sink=sink)

    batch.check((o, lse * torch.log(torch.tensor(2.0))), expected)
    with pytest.raises(qkv.InvalidError, match="sink"):
        attention.run(batch.q, batch.pool, alibi_slopes=slopes)


def test_rope_by_position():
    batch = Batch()
    attention = Attention(**BASE, page_size=PAGE, rope=qkv.Rope(theta=5e5, interleaved=True))
    attention.plan(**batch.index("csr"))
    turned = [rope_reference(k, torch.arange(len(k)), DIM, True, 5e5) for k in batch.k]
    positions = torch.cat([torch.arange(rows) + keys - rows for rows, keys in LENGTHS])
    q = rope_reference(batch.q, positions, DIM, True, 5e5)
    batch.check(attention.run(batch.q, batch.pool, lse=True), lambda i: batch.reference(i, q=q, k=turned, allowed=causal(*LENGTHS[i])))


def test_positions_of_the_rows():
    batch = Batch([(3, 10)])
    attention = Attention(**BASE, page_size=PAGE)
    attention.plan(**batch.index("csr"), qo_pos=[4])
    allowed = torch.arange(10) <= torch.arange(3)[:, None] + 4
    batch.check(attention.run(batch.q, batch.pool, lse=True), lambda i: batch.reference(i, allowed=allowed))


def pack(allowed):
    """Bits of each request from a whole byte on, lowest first."""
    rows = [torch.nn.functional.pad(a.flatten(), (0, -a.numel() % 8)).view(-1, 8) for a in allowed]
    packed = [(r.int() << torch.arange(8).int()).sum(1).to(torch.uint8) for r in rows]
    return torch.cat(packed), torch.tensor([0, *map(len, packed)]).cumsum(0)


def test_custom_mask():
    batch = Batch()
    allowed = [torch.rand(shape) < 0.5 for shape in LENGTHS]
    bits, indptr = pack(allowed)
    attention = Attention(**BASE, page_size=PAGE, mask="custom")
    expected = lambda i: batch.reference(i, allowed=allowed[i])
    attention.plan(**batch.index("csr"), mask_bits=bits, mask_indptr=indptr)
    batch.check(attention.run(batch.q, batch.pool, lse=True), expected)
    attention.plan(**batch.index("csr"), mask_bits=bits.tolist(), mask_indptr=indptr.tolist())
    batch.check(attention.run(batch.q, batch.pool, lse=True), expected)


def test_blocks():
    """Two requests of two row blocks each; a block has a mask of its own."""
    batch = Batch([(4, 8), (3, 6)])
    blocks = [[0, 2], [1], [], [0, 1]]
    kept = torch.rand(5, 2, 4) < 0.7
    allowed, at = [], 0
    for request, (rows, keys) in enumerate(batch.lengths):
        of_request = torch.zeros(4, 12, dtype=torch.bool)
        for block in range(2):
            for column in blocks[2 * request + block]:
                of_request[2 * block : 2 * block + 2, 4 * column : 4 * column + 4] = kept[at]
                at += 1
        allowed.append(of_request[:rows, :keys])
    blocks[0] = [0, 1]  # 8 keys are two column blocks
    allowed[0] = torch.zeros(4, 8, dtype=torch.bool)
    for i, (block, column) in enumerate([(0, 0), (0, 1), (1, 1)]):
        allowed[0][2 * block : 2 * block + 2, 4 * column : 4 * column + 4] = kept[i]
    attention = Attention(**BASE, page_size=PAGE, mask="none", max_row_blocks=8)
    attention.plan(
        **batch.index("csr"), bsr_rows=2, bsr_cols=4, bsr_indptr=[[0, 2, 3, 3, 5]],
        bsr_indices=torch.tensor(sum(blocks, [])).int(), bsr_mask=pack([kept[i] for i in range(5)])[0].view(5, 1),
    )
    batch.check(attention.run(batch.q, batch.pool, lse=True), lambda i: batch.reference(i, allowed=allowed[i]))


def test_levels_and_detection_of_a_shared_prefix():
    """Two requests share two pages; one has a page of its own, the other two."""
    shared, own = torch.tensor([5, 1]).int(), [torch.tensor([2]).int(), torch.tensor([0, 4]).int()]
    pool = torch.randn(6, 2, PAGE, KV_HEADS, DIM)
    lens = [3, PAGE + 2]
    q = torch.randn(3, HEADS, DIM)
    keys = [torch.cat([torch.cat([pool[p, :] for p in shared.tolist()], 1), torch.cat([pool[p] for p in o.tolist()], 1)[:, :n]], 1) for o, n in zip(own, lens)]

    def check(got):
        for rows, kv in ((slice(0, 1), keys[0]), (slice(1, 3), keys[1])):
            o, lse = reference.attention(q[rows], kv[0], kv[1], allowed=causal(len(q[rows]), kv.shape[1]))
            close(got[0][rows], o, scale=4)
            close(got[1][rows], lse, scale=4)

    attention = Attention(**BASE, page_size=PAGE, max_levels=2)
    attention.plan(
        levels=[
            dict(qo_indptr=[0, 3], kv_indptr=[0, 2], kv_indices=shared, kv_last_page_len=[PAGE]),
            dict(qo_indptr=[0, 1, 3], kv_indptr=[0, 1, 3], kv_indices=torch.cat(own), kv_last_page_len=[3, 2]),
        ]
    )
    check(attention.run(q, pool, lse=True))
    table = torch.tensor([[5, 1, 2, -1], [5, 1, 0, 4]]).int()
    attention.plan(qo_indptr=[0, 1, 3], block_table=table, kv_lens=[11, 14], detect_shared_prefix=True)
    check(attention.run(q, pool, lse=True))
    with pytest.raises(TypeError, match="no parameter 'kv_index'"):
        attention.plan(levels=[dict(kv_index=[0])])
    with pytest.raises(TypeError, match="levels: expected dicts"):
        attention.plan(levels=[[0]])
    with pytest.raises(qkv.InvalidError, match="levels: expected without qo_indptr"):
        attention.plan(qo_indptr=[0, 3], levels=[dict(qo_indptr=[0, 3])])
    with pytest.raises(qkv.InvalidError, match="levels: expected 1 to"):
        attention.plan(levels=[])
    with pytest.raises(TypeError, match="misses the argument 'qo_indptr'"):
        attention.plan(kv_indptr=[0, 1])


VARIANT = qkv.Variant(
    "tempered",
    """
    #define VARIANT_LOGIT 1
    QI_FN float variant_logit(const variant_params *v, qi_pos pos, float logit)
    {
        return logit * v->factor + v->table.data[(pos.kv_pos % v->period) * v->table.stride[0]];
    }
    """,
    [("factor", "f32"), ("period", "i32"), ("table", "f32", 1)],
)


@pytest.fixture(scope="module")
def cached_ctx(tmp_path_factory):
    return qkv.Context("cpu", cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_variant_and_its_arguments(cached_ctx):
    batch = Batch()
    attention = Attention(**BASE, page_size=PAGE, variant=VARIANT, ctx=cached_ctx)
    attention.plan(**batch.index("csr"))
    table = torch.randn(3)

    def expected(i):
        rows, keys = LENGTHS[i]
        return batch.reference(i, allowed=causal(rows, keys), sm_scale=0.5 * DIM**-0.5, logit=lambda x, _: x + table.double()[torch.arange(keys) % 3])

    for args in ((0.5, 3, table), dict(table=table, factor=0.5, period=3)):
        batch.check(attention.run(batch.q, batch.pool, lse=True, args=args), expected)
    for args, error, message in (
        ((0.5, 3), qkv.InvalidError, "args: expected 3 for the variant, got 2"),
        (dict(factor=0.5, period=3), TypeError, "args: expected one for 'table'"),
        (dict(factor=0.5, period=3, table=table, more=1), TypeError, "args: expected"),
        ((0.5, "3", table), TypeError, "period: expected an integer"),
        ((None, 3, table), TypeError, "factor"),
        ((0.5, 3, 7), TypeError, "table: expected an array"),
    ):
        with pytest.raises(error, match=message):
            attention.run(batch.q, batch.pool, args=args)


def test_a_variant_that_does_not_compile(cached_ctx):
    broken = VARIANT._replace(source="#define VARIANT_LOGIT 1\nthis is not C")
    with pytest.raises(qkv.CompileError):
        Attention(**BASE, variant=broken, ctx=cached_ctx)
    for variant in ("tempered", VARIANT._replace(params=[("factor",)]), VARIANT._replace(params=[("factor", "f32", 1, 2)])):
        with pytest.raises(TypeError, match="variant"):
            Attention(**BASE, variant=variant)


@pytest.mark.parametrize("form", ["numbers", "arrays", "scalars", "a head"])
def test_scales_and_8_bit_caches(form):
    batch = Batch(dtype=torch.bfloat16)
    scales = dict(q_scale=0.5, k_scale=0.25, v_scale=2.0, o_scale=4.0)
    pool = batch.pool.float().nan_to_num(0.0).to(torch.float8_e4m3fn)
    attention = Attention(**BASE | dict(dtype_q="bf16"), dtype_kv=torch.float8_e4m3fn, dtype_o="f32", page_size=PAGE)
    attention.plan(**batch.index("csr"))
    heads = dict(q_scale=HEADS, k_scale=KV_HEADS, v_scale=KV_HEADS, o_scale=HEADS)
    given = {
        "numbers": lambda name, x: x,
        "arrays": lambda name, x: torch.tensor([x]),
        "scalars": lambda name, x: torch.tensor(x),
        "a head": lambda name, x: [x] * heads[name],
    }[form]
    k, v = ([x.to(torch.float8_e4m3fn).double() for x in xs] for xs in (batch.k, batch.v))
    got = attention.run(batch.q, pool, lse=True, **{name: given(name, x) for name, x in scales.items()})

    def expected(i):
        o, lse = batch.reference(i, k=k, v=v, allowed=causal(*LENGTHS[i]), sm_scale=DIM**-0.5 * 0.5 * 0.25)
        return o * 2.0 / 4.0, lse

    batch.check(got, expected, scale=2000)
    with pytest.raises(qkv.InvalidError, match="k_scale: expected a scale > 0, got 0"):
        attention.run(batch.q, pool, k_scale=0)


def test_merge_of_parts_is_attention_over_all():
    q, (k, v) = torch.randn(3, HEADS, DIM), torch.randn(2, 20, KV_HEADS, DIM)
    cuts = [0, 1, 7, 20]
    parts = [reference.attention(q, k[a:b], v[a:b]) for a, b in zip(cuts, cuts[1:])]
    o_states, lse_states = ([x.float().contiguous() for x in xs] for xs in zip(*parts))
    o_ref, lse_ref = reference.attention(q, k, v)
    o, lse = merge(o_states, lse_states, lse=True)
    close(o, o_ref, scale=4)
    close(lse, lse_ref, scale=4)
    ln2 = torch.log(torch.tensor(2.0))
    in_base_2 = [x / ln2 for x in lse_states]
    lse_out = torch.empty(3, HEADS)
    o, lse = merge(o_states, in_base_2, base_2=True, o=o_states[0], lse=lse_out)
    assert o is o_states[0] and lse is lse_out
    close(o, o_ref, scale=4)
    close(lse * ln2, lse_ref, scale=4)


def test_merge_leaves_out_empty_states():
    o_states, lse_states = list(torch.randn(2, 2, HEADS, DIM)), list(torch.randn(2, 2, HEADS))
    o_states[1][0], lse_states[1][0] = torch.nan, -torch.inf
    lse_states[0][1] = lse_states[1][1] = -torch.inf
    o = merge(o_states, lse_states)
    assert torch.equal(o[0], o_states[0][0]) and (o[1] == 0).all()
    for bad in ([], [o_states[0]] * 65, o_states[:1]):
        with pytest.raises(qkv.InvalidError, match="lse_states: expected as many"):
            merge(bad, lse_states)


def test_can_run_and_workspace_size():
    assert any(line.endswith(": runs") for line in can_run(**BASE).splitlines())
    plan, scratch, pinned = workspace_size(**BASE, page_size=PAGE)
    assert plan > 0 and scratch > 0 and pinned == 0
    for function in (can_run, workspace_size, Attention):
        with pytest.raises(qkv.InvalidError, match="head_dim"):
            function(**BASE | dict(head_dim_qk=7))
        with pytest.raises(TypeError, match="misses the argument 'max_tokens'"):
            function(**{name: value for name, value in BASE.items() if name != "max_tokens"})


def test_errors_name_the_argument():
    batch = Batch()
    attention = Attention(**BASE, page_size=PAGE, pool_pages=len(batch.pool))
    with pytest.raises(qkv.InvalidError, match="plan"):
        attention.run(batch.q, batch.pool)
    with pytest.raises(qkv.InvalidError, match="kv_indices"):
        attention.plan(**batch.index("csr") | dict(kv_indices=batch.index("csr")["kv_indices"] + 1000))
    with pytest.raises(qkv.InvalidError, match="qo_indptr: .*i32"):
        attention.plan(**batch.index("csr") | dict(qo_indptr=batch.qo_indptr.long()))
    attention.plan(**batch.index("csr"))
    for arrays, message in (
        (dict(q=batch.q[:-1]), "q: "),
        (dict(q=batch.q.double()), "q: "),
        (dict(k=batch.pool[:, :, :, :1]), "k: "),
        (dict(o=torch.empty(1, HEADS, DIM)), "o: "),
        (dict(lse=torch.empty(1, HEADS)), "lse: "),
    ):
        with pytest.raises(qkv.InvalidError, match=message):
            attention.run(**dict(q=batch.q, k=batch.pool) | arrays)
    with pytest.raises(qkv.InvalidError, match='mask: expected "none" or "causal" or "custom", got \'tree\''):
        Attention(**BASE, mask="tree")
    with pytest.raises(TypeError, match="rope: expected a qkv.Rope"):
        Attention(**BASE, rope=True)


def test_rows_after_the_last_request_are_not_written():
    batch = Batch()
    attention = Attention(**BASE, page_size=PAGE)
    attention.plan(**batch.index("csr"))
    q = torch.cat([batch.q, torch.randn(2, HEADS, DIM)])
    o = torch.full_like(q, 7.0)
    attention.run(q, batch.pool, o=o)
    assert (o[-2:] == 7.0).all() and not (o[:-2] == 7.0).any()


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph():
    batch = Batch(dtype=torch.bfloat16, device="cuda")
    attention = Attention(**BASE | dict(dtype_q="bf16"), page_size=PAGE, device="cuda")
    index = {name: array.cuda() for name, array in batch.index("table").items()} | dict(max_tokens=len(batch.q))
    o, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2], device="cuda")
    graph = torch.cuda.CUDAGraph()
    attention.plan(**index)
    attention.run(batch.q, batch.pool, o=o, lse=lse)
    with torch.cuda.graph(graph):
        attention.plan(**index)
        attention.run(batch.q, batch.pool, o=o, lse=lse)
        with pytest.raises(qkv.InvalidError, match="captured"):
            attention.plan(**batch.index("table"))
    o.zero_()
    graph.replay()
    torch.cuda.synchronize()
    batch.check((o, lse), lambda i: batch.reference(i, allowed=causal(*batch.lengths[i])))
    lens = index["kv_lens"]
    lens.copy_((lens - 1).clamp(min=0))  # a replay reads what the arrays hold then
    graph.replay()
    torch.cuda.synchronize()
    i = len(batch.lengths) - 1
    rows, keys = batch.lengths[i]
    part = slice(batch.qo_indptr[i], batch.qo_indptr[i + 1])
    close(o[part], reference.attention(batch.q[part], batch.k[i][:-1], batch.v[i][:-1], allowed=causal(rows, keys - 1))[0])
