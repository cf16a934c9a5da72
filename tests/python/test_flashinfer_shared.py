"""Merging, cascades, POD, BatchAttention and block-sparse attention of qkv.flashinfer against float64."""

import math
import types

import pytest
import torch
from flashinfer_reference import Paged, check, close, indptr, queries, reference, workspace

import qkv.flashinfer as fi


def states(n, parts, heads=4, dim=64, device="cpu"):
    """A row's keys in parts, their states, and the state over all."""
    q = queries(n, heads, dim, torch.float32, device)
    k, v = (queries(8 * parts, heads, dim, torch.float32, device) for _ in range(2))
    each = [
        fi.single_prefill_with_kv_cache_return_lse(q, k[8 * s : 8 * s + 8], v[8 * s : 8 * s + 8]) for s in range(parts)
    ]
    return each, reference(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merges(device, dtype):
    each, expected = states(5, 3, device=device)
    each = [(v.to(dtype), s) for v, s in each]
    two = fi.merge_state(*each[0], *each[1])
    v, s = fi.merge_state(*two, *each[2])
    close(v, expected[0])
    close(s, expected[1])
    v, s = fi.merge_states(torch.stack([v for v, _ in each], 1), torch.stack([s for _, s in each], 1))
    close(v, expected[0])
    close(s, expected[1])
    v, s = (x.clone() for x in each[0])
    fi.merge_state_in_place(v, s, *each[1])
    assert torch.equal(v, two[0]) and torch.equal(s, two[1])
    v, s = (x.clone() for x in each[0])
    mask = torch.tensor([True, False, True, True, False], device=device)
    fi.merge_state_in_place(v, s, *each[1], mask=mask)
    assert torch.equal(s[mask], two[1][mask]) and torch.equal(s[~mask], each[0][1][~mask])
    close(v[~mask], each[0][0][~mask])


def test_merges_of_nothing(device):
    v, s = fi.merge_states(torch.zeros(3, 0, 2, 64, device=device), torch.zeros(3, 0, 2))
    assert not v.any() and torch.isneginf(s).all() and v.shape == (3, 2, 64) and s.shape == (3, 2)
    v = torch.full((1, 1, 64), math.nan, device=device)
    s = torch.full((1, 1), -math.inf, device=device)
    merged = fi.merge_state(v, s, v, s)
    assert not merged[0].any() and torch.isneginf(merged[1]).all()
    each, expected = states(2, 70, device=device)
    v, s = fi.merge_states(torch.stack([v for v, _ in each], 1), torch.stack([s for _, s in each], 1))
    close(v, expected[0])


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("causal,window_left", [(True, -1), (False, -1), (True, 9)])
def test_cascade(device, graph, causal, window_left):
    """Levels: all 4 requests, two groups of 1 and 3, each its own."""
    paged = Paged([16, 8, 12, 5, 9, 7, 3], 4, 2, 64, device=device)
    owners = [[0, 1, 3], [0, 2, 4], [0, 2, 5], [0, 2, 6]]
    qo_lens = [2, 1, 4, 3]
    rows = [[10], [2, 8], qo_lens]
    parts = [[0], [1, 2], [3, 4, 5, 6]]
    arrays = ([], [], [], [])
    for level, owned in zip(rows, parts):
        tables = [paged.tables[r] for r in owned]
        arrays[0].append(indptr(level))
        arrays[1].append(indptr([len(t) for t in tables]))
        arrays[2].append(torch.tensor(sum(tables, []), dtype=torch.int32))
        arrays[3].append(paged.last[owned])
    buffers = {}
    if graph:
        names = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
        for name, given in zip(names, arrays):
            sizes = [32 if name == "paged_kv_indices" else len(x) for x in given]
            buffers[f"{name}_buf_arr"] = [torch.zeros(n, dtype=torch.int32, device=device) for n in sizes]
    wrapper = fi.MultiLevelCascadeAttentionWrapper(3, workspace(device), "NHD", use_cuda_graph=graph, **buffers)
    q = queries(10, 4, 64, device=device)
    for _ in range(2):
        wrapper.plan(*arrays, 4, 2, 64, 4, causal=causal, window_left=window_left)
        o = wrapper.run(q, paged.cache)
        at = 0
        for owned, n in zip(owners, qo_lens):
            k, v = (torch.cat([x[r] for r in owned]) for x in (paged.k, paged.v))
            expected = reference(q[at : at + n], k, v, causal, window_left)
            close(o[at : at + n], expected[0])
            at += n
    with pytest.raises(ValueError, match="expected 3 arrays"):
        wrapper.plan(*(a[:2] for a in arrays), 4, 2, 64, 4)


def test_shared_prefix_wrappers(device):
    paged = Paged([5, 9, 0], 4, 2, 64, device=device)
    k, v = (queries(11, 2, 64, device=device) for _ in range(2))
    own = types.SimpleNamespace(
        k=[torch.cat([k.cpu(), x]) for x in paged.k], v=[torch.cat([v.cpu(), x]) for x in paged.v]
    )
    q = queries(3, 4, 64, device=device)
    decode = fi.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(device))
    decode.begin_forward(*paged.table, 4, 2, 64, 4)
    o = decode.forward(q, k, v, paged.cache, sm_scale=0.2)
    for r in range(3):
        close(o[r], reference(q[r : r + 1], own.k[r], own.v[r], sm_scale=0.2)[0][0])
    q = queries(6, 4, 64, device=device)
    prefill = fi.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace(device))
    prefill.begin_forward(indptr([2, 4, 0]), *paged.table, 4, 2, 64, 4)
    o = prefill.forward(q, k, v, paged.cache, causal=True)
    for r, (at, n) in enumerate([(0, 2), (2, 4)]):
        close(o[at : at + n], reference(q[at : at + n], own.k[r], own.v[r], causal=True)[0])


def test_batch_attention(device):
    qo_lens, lens = [1, 6, 0, 4], [9, 6, 3, 17]
    paged = Paged(lens, 4, 2, 64, torch.bfloat16, device=device)
    q = queries(11, 6, 64, torch.bfloat16, device)
    wrapper = fi.BatchAttention("NHD", device)
    arrays = [x.to(device) for x in (indptr(qo_lens), *paged.table[:2], torch.tensor(lens).int())]
    wrapper.plan(*arrays, 6, 2, 64, 64, 4, causal=True, logits_soft_cap=3.0)
    check(
        wrapper.run(q, paged.cache, logits_soft_cap=3.0),
        q,
        paged,
        qo_lens,
        torch.bfloat16,
        causal=True,
        logits_soft_cap=3.0,
    )
    # Pages beyond a request's length are left out.
    short = types.SimpleNamespace(k=[x[:5] for x in paged.k], v=[x[:5] for x in paged.v])
    short.k[2], short.v[2] = short.k[2][:0], short.v[2][:0]
    kv_lens = torch.tensor([5, 5, 0, 5], dtype=torch.int32)
    wrapper.plan(indptr(qo_lens), *paged.table[:2], kv_lens, 6, 2, 64, 64, 4)
    check(wrapper.run(q, paged.cache), q, short, qo_lens, torch.bfloat16)
    with pytest.raises(ValueError, match="kv_len_arr"):
        wrapper.plan(indptr(qo_lens), *paged.table[:2], kv_lens + 9, 6, 2, 64, 64, 4)


def test_batch_attention_by_offsets(device):
    """The other form of its plan is that of qkv.attention.BatchAttention."""
    paged = Paged([9, 6], 4, 2, 64, torch.bfloat16, combined=False, device=device)
    q = queries(5, 6, 64, torch.bfloat16, device)
    wrapper = fi.BatchAttention(backend="cutlass")
    tables, lens = paged.block_tables()
    packed = paged.indices.to(device)
    for table in (tables, packed):
        wrapper.plan(indptr([2, 3]).to(device), lens, table, 6, 2, 64, 64, page_size=4, causal=True)
        check(wrapper.run(q, paged.cache), q, paged, [2, 3], torch.bfloat16, causal=True)


def test_attention_sink_wrapper(device):
    paged = Paged([9, 6], 4, 2, 64, torch.bfloat16, device=device)
    q = queries(5, 6, 64, torch.bfloat16, device)
    sink = torch.randn(6)
    wrapper = fi.BatchAttentionWithAttentionSinkWrapper(workspace(device), window_left=4)
    wrapper.plan(indptr([2, 3]), *paged.table, 6, 2, 64, 4, causal=True, window_left=4, q_data_type=torch.bfloat16)
    found = wrapper.run(q, paged.cache, sink.to(device), 0.3, return_lse=True)
    options = {"causal": True, "window_left": 4, "sink": sink, "sm_scale": 0.3}
    check(found, q, paged, [2, 3], torch.bfloat16, **options)


def test_pod(device):
    paged = Paged([9, 0, 30], 4, 2, 64, device=device)
    q_d, q_p = queries(3, 4, 64, device=device), queries(5, 4, 64, device=device)
    k_p, v_p = (queries(12, 2, 64, device=device) for _ in range(2))
    wrapper = fi.PODWithPagedKVCacheWrapper(workspace(device))
    wrapper.plan(*paged.table, 4, 2, 64, 4)
    (o_p, lse_p), decode = wrapper.run(
        q_p, k_p, v_p, q_d, paged.cache, causal_p=True, return_lse_p=True, return_lse_d=True
    )
    expected = reference(q_p, k_p, v_p, causal=True)
    close(o_p, expected[0])
    close(lse_p, expected[1], torch.float16)
    check(decode, q_d, paged, [1] * 3)
    _, decode = wrapper.run(q_p, k_p, v_p, q_d, paged.cache, sm_scale_d=0.3, window_left_d=3, return_lse_d=True)
    check(decode, q_d, paged, [1] * 3, sm_scale=0.3, window_left=3)
    batch = fi.BatchPODWithPagedKVCacheWrapper(workspace(device))
    q = queries(7, 4, 64, device=device)
    batch.plan(indptr([3, 0, 4]), *paged.table, indptr([1] * 3), *paged.table, 4, 2, 64, 4)
    prefill, decode = batch.run(q, paged.cache, q_d, paged.cache, causal_p=True, return_lse=True)
    check(prefill, q, paged, [3, 0, 4], causal=True)
    check(decode, q_d, paged, [1] * 3)


@pytest.mark.parametrize("masked", [None, "mask", "packed_mask"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("R,C", [(1, 1), (4, 3), (16, 8)])
def test_block_sparse(device, masked, causal, R, C):
    M, N = 3 * R, 5 * C
    listed = torch.rand(3, 5) < 0.6
    listed[1] = False
    lists = [row.nonzero().flatten()[torch.randperm(int(row.sum()))] for row in listed]
    lens = [len(x) for x in lists]
    inner = torch.rand(sum(lens), R, C) < 0.5
    if masked is None:
        inner[:] = True
    dense = torch.zeros(M, N, dtype=torch.bool)
    at, packed = 0, []
    for i, row in enumerate(lists):
        for j in row.tolist():
            dense[i * R : (i + 1) * R, j * C : (j + 1) * C] = inner[at]
            at += 1
        blocks = inner[at - len(row) : at].transpose(0, 1).reshape(-1)
        packed.append(fi.packbits(blocks, "little"))
    if causal:
        dense &= torch.arange(N) <= torch.arange(M)[:, None] + N - M
    given = {"mask": inner, "packed_mask": torch.cat(packed)}
    given = {masked: given[masked].to(device)} if masked else {}
    q = queries(M, 6, 64, device=device)
    k, v = (queries(N, 2, 64, device=device) for _ in range(2))
    wrapper = fi.BlockSparseAttentionWrapper(workspace(device))
    wrapper.plan(
        indptr(lens).to(device), torch.cat(lists).int().to(device), M, N, R, C, 6, 2, 64, causal=causal, **given
    )
    o, lse = wrapper.run(q, k, v, return_lse=True)
    expected = reference(q, k, v, mask=dense)
    close(o, expected[0])
    close(lse, expected[1], torch.float16)
    close(wrapper.forward(q, k, v, sm_scale=0.3), reference(q, k, v, mask=dense, sm_scale=0.3)[0])


def test_variable_block_sparse(device):
    rows = torch.tensor([[2, 4, 6], [4, 4, 4]])
    cols = torch.tensor([[3, 9, 0, 3], [6, 3, 3, 3]])
    blocks = torch.rand(2, 3, 4) < 0.6
    q = queries(4, 12, 64, device=device)
    k, v = (queries(2, 15, 64, device=device) for _ in range(2))
    wrapper = fi.VariableBlockSparseAttentionWrapper(workspace(device))
    wrapper.plan(blocks.to(device), rows.to(device), cols.to(device), 4, 2, 64)
    o, lse = wrapper.run(q, k, v, return_lse=True)
    assert o.shape == (4, 12, 64) and lse.shape == (4, 12)
    assert torch.equal(wrapper.forward(q, k, v), o)
    for head in range(2):
        dense = blocks[head].repeat_interleave(rows[head], 0).repeat_interleave(cols[head], 1)
        mine = slice(2 * head, 2 * head + 2)
        expected = reference(
            q[mine].transpose(0, 1), k[head : head + 1].transpose(0, 1), v[head : head + 1].transpose(0, 1), mask=dense
        )
        close(o[mine].transpose(0, 1), expected[0])
        close(lse[mine].T, expected[1], torch.float16)
    with pytest.raises(ValueError, match="same sum"):
        wrapper.plan(blocks, rows + torch.tensor([[0], [1]]), cols, 4, 2, 64)
