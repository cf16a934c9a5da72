"""The batch wrappers of qkv.flashinfer and block tables against float64 arithmetic."""

import functools
import math
import types

import numpy as np
import pytest
import torch
from flashinfer_reference import Paged, check, close, graph_buffers, indptr, queries, reference, workspace

import qkv.flashinfer as fi


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size,layout", [(1, "NHD"), (5, "HND"), (16, "NHD"), (16, "HND")])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"window_left": 6}, {"logits_soft_cap": 3.0}])
def test_decode(device, dtype, page_size, layout, group, options):
    paged = Paged([0, 1, 16, 37, 5], page_size, 2, 64, dtype, layout, group != 3, device)
    q = queries(5, 2 * group, 64, dtype, device)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(device), layout)
    wrapper.plan(*paged.table, 2 * group, 2, 64, page_size, q_data_type=dtype, **options)
    check(wrapper.run(q, paged.cache, return_lse=True), q, paged, [1] * 5, dtype, **options)
    out, lse = torch.empty_like(q), torch.empty(5, 2 * group, device=device)
    found = wrapper.run(q, paged.cache, out=out, lse=lse, return_lse=True)
    assert found[0] is out and found[1] is lse
    check(found, q, paged, [1] * 5, dtype, **options)
    assert torch.equal(wrapper.run(q, paged.cache), out)


def test_decode_arrays_on_either_side(device):
    """Indices on the GPU and lengths on the host, as vLLM has them; all on the GPU, as SGLang."""
    paged = Paged([0, 7, 30], 4, 2, 64, device=device)
    q = queries(3, 4, 64, device=device)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    for first, second, third in [(0, 1, 0), (1, 1, 1), (0, 0, 0)]:
        there = [paged.indptr, paged.indices, paged.last]
        there = [x.to(device) if on else x for x, on in zip(there, (first, second, third))]
        wrapper.plan(*there, 4, 2, 64, 4, sm_scale=0.3)
        found = wrapper.run_return_lse(q, paged.cache)
        check(found, q, paged, [1, 1, 1], sm_scale=0.3)


def test_decode_last_page_len_0_is_a_full_page(device):
    paged = Paged([8, 0, 3, 4], 4, 1, 64, device=device)
    q = queries(4, 2, 64, device=device)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    last = torch.where(paged.last == 4, 0, paged.last)
    assert last.tolist() == [0, 0, 3, 0]
    wrapper.plan(paged.indptr, paged.indices, last, 2, 1, 64, 4)
    check(wrapper.run(q, paged.cache, return_lse=True), q, paged, [1] * 4)
    # and engines pad requests without pages with a 1
    last[1] = 1
    wrapper.plan(paged.indptr, paged.indices, last, 2, 1, 64, 4)
    check(wrapper.run(q, paged.cache, return_lse=True), q, paged, [1] * 4)


def test_decode_of_several_rows_a_request(device):
    paged = Paged([3, 9, 20], 4, 2, 64, device=device)
    q = queries(9, 4, 64, device=device)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(device), use_tensor_cores=True)
    wrapper.plan(*paged.table, 4, 2, 64, 4, q_len_per_req=3)
    check(wrapper.run(q, paged.cache, return_lse=True), q, paged, [3] * 3, causal=True)
    wrapper.plan(*paged.table, 4, 2, 64, 4)
    found = wrapper.run(q, paged.cache, return_lse=True, q_len_per_req=3)
    check(found, q, paged, [3] * 3, causal=True)


def test_decode_of_nothing(device):
    paged = Paged([], 4, 2, 64, device=device)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    wrapper.plan(*paged.table, 4, 2, 64, 4)
    assert wrapper.run(queries(0, 4, 64, device=device), paged.cache).shape == (0, 4, 64)


def test_decode_grows_with_the_batch_and_keeps_plans_apart(device):
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    for lens in ([5], [40] * 40, [2000, 3], [1] * 70):
        paged = Paged(lens, 1, 1, 64, device=device)
        q = queries(len(lens), 2, 64, device=device)
        wrapper.plan(*paged.table, 2, 1, 64, 1)
        check(wrapper.run(q, paged.cache, return_lse=True), q, paged, [1] * len(lens))


@pytest.mark.parametrize("kv", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_and_fp8_cache(device, kv):
    paged = Paged([4, 19], 4, 2, 64, torch.float32, device=device)
    paged.cache = (paged.cache / 2).to(kv)
    paged.k = [(x / 2).to(kv).float() * 1.5 for x in paged.k]
    paged.v = [(x / 2).to(kv).float() * 2.5 for x in paged.v]
    q = queries(2, 4, 64, torch.bfloat16, device)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    wrapper.plan(*paged.table, 4, 2, 64, 4, q_data_type=torch.bfloat16, kv_data_type=kv)
    for one in (1.0, torch.tensor(1.0, device=device)):
        found = wrapper.run(q, paged.cache, q_scale=0.5 * one, k_scale=1.5 * one, v_scale=2.5 * one, return_lse=True)
        check(found, q.float() * 0.5, paged, [1, 1], torch.bfloat16)


def test_fp8_queries_with_scales_of_each_head(device):
    e4m3 = torch.float8_e4m3fn
    paged = Paged([4, 19], 4, 2, 64, torch.float32, device=device)
    paged.cache = paged.cache.to(e4m3)
    scale_q, scale_k, scale_v = (torch.rand(n) + 0.5 for n in (4, 2, 2))
    paged.k = [x.to(e4m3).float() * scale_k[:, None] for x in paged.k]
    paged.v = [x.to(e4m3).float() * scale_v[:, None] for x in paged.v]
    q = queries(5, 4, 64, e4m3, device)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(workspace(device))
    wrapper.plan(indptr([2, 3]), *paged.table, 4, 2, 64, 4, q_data_type=e4m3, o_data_type="bfloat16")
    scales = [s.to(device) for s in (scale_q, scale_k, scale_v)]
    found = wrapper.run(q, paged.cache, *scales, return_lse=True)
    assert found[0].dtype == torch.bfloat16
    check(found, q.cpu().float() * scale_q[:, None], paged, [2, 3], torch.bfloat16)
    with pytest.raises(TypeError, match="three scales"):
        wrapper.run(q, paged.cache, scales[0])


def test_decode_with_sinks_and_without(device):
    """One plan, runs of both kinds; the next plan is good for both again."""
    sink = torch.randn(4)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    for lens in ([4, 19, 0], [3, 1, 30]):
        paged = Paged(lens, 4, 2, 64, device=device)
        q = queries(3, 4, 64, device=device)
        wrapper.plan(*paged.table, 4, 2, 64, 4)
        found = wrapper.run(q, paged.cache, sinks=sink.to(device), return_lse=True)
        check(found, q, paged, [1] * 3, sink=sink)
        check(wrapper.run(q, paged.cache, return_lse=True), q, paged, [1] * 3)


def test_decode_batch_invariant(device):
    """disable_split_kv: the bits of a request do not depend on its neighbours."""
    paged = Paged([300, 9, 5000], 4, 1, 64, device=device)
    q = queries(3, 2, 64, device=device)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(device), use_tensor_cores=True)
    wrapper.plan(*paged.table, 2, 1, 64, 4, fixed_split_size=2048, disable_split_kv=True)
    both = wrapper.run(q, paged.cache)
    close(both[2], reference(q[2:], paged.k[2], paged.v[2])[0][0])
    first = int(paged.indptr[2])
    table = paged.indptr[2:] - first, paged.indices[first:], paged.last[2:]
    wrapper.plan(*table, 2, 1, 64, 4, fixed_split_size=2048, disable_split_kv=True)
    assert torch.equal(wrapper.run(q[2:], paged.cache)[0], both[2])


def graph_decoder(batch, pages, device):
    buffers = graph_buffers(batch, pages, device)
    return fi.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(device), *buffers), buffers


def test_decode_with_graph_buffers(device):
    wrapper, buffers = graph_decoder(3, 40, device)
    assert wrapper.is_cuda_graph_enabled
    for lens in ([1, 1, 1], [33, 0, 60], [2, 16, 4]):
        paged = Paged(lens, 4, 2, 64, device=device)
        q = queries(3, 4, 64, device=device)
        last = torch.where(paged.last == 4, 0, paged.last)
        wrapper.plan(paged.indptr, paged.indices, last, 4, 2, 64, 4)
        assert wrapper._paged_kv_indptr_buf is buffers[0]
        assert buffers[1][: len(paged.indices)].tolist() == paged.indices.tolist()
        check(wrapper.run(q, paged.cache, return_lse=True), q, paged, [1] * 3)
    with pytest.raises(ValueError, match="3 requests"):
        wrapper.plan(*Paged([1, 1], 4, 2, 64).table, 4, 2, 64, 4)
    with pytest.raises(ValueError, match="indices: expected at most the 40"):
        wrapper.plan(*Paged([1, 1, 200], 4, 2, 64).table, 4, 2, 64, 4)
    with pytest.raises(ValueError, match="paged_kv_indices_buffer"):
        fi.BatchDecodeWithPagedKVCacheWrapper(
            workspace(device),
            use_cuda_graph=True,
            paged_kv_indptr_buffer=buffers[0],
            paged_kv_last_page_len_buffer=buffers[2],
        )


def test_a_captured_run_follows_later_plans(device):
    """A graph replays what run called: here its Attention, with nothing planned in between but by plan()."""
    wrapper, _ = graph_decoder(3, 40, device)
    captured = []
    for lens in ([1, 2, 3], [33, 0, 60], [2, 16, 4]):
        paged = Paged(lens, 4, 2, 64, device=device)
        q = queries(3, 4, 64, device=device)
        wrapper.begin_forward(*paged.table, 4, 2, 64, 4)
        for cap, operator in captured:
            o = operator.run(q, paged.cache, sm_scale=0.3, logits_soft_cap=cap)
            for r in range(3):
                close(o[r], reference(q[r : r + 1], paged.k[r], paged.v[r], False, -1, 0.3, cap)[0][0])
        if not captured:
            for cap in (0.0, 2.0):
                wrapper.forward(q, paged.cache, sm_scale=0.3, logits_soft_cap=cap)
                captured.append((cap, wrapper._operator.get(wrapper._plain)))
            assert captured[0][1] is not captured[1][1]


@pytest.mark.gpu
def test_captured_decode_follows_later_plans():
    device = torch.device("cuda")
    wrapper, _ = graph_decoder(3, 400, device)
    pool = torch.randn(400, 2, 4, 2, 64, device=device).half()
    q = queries(3, 4, 64, device=device)
    out = torch.empty_like(q)

    def plan(lens):
        pages = [-(-n // 4) for n in lens]
        indices = torch.randperm(400)[: sum(pages)].int()
        last = torch.tensor([(n - 1) % 4 + 1 for n in lens]).int()
        wrapper.plan(indptr(pages), indices.to(device), last, 4, 2, 64, 4)
        return pages, indices

    plan([1, 1, 1])
    wrapper.run(q, pool, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, pool, out=out)
    for lens in ([500, 3, 77], [1, 900, 2], [4, 8, 12]):
        pages, indices = plan(lens)
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        at = 0
        for r, n in enumerate(lens):
            own = pool[indices[at : at + pages[r]].long().to(device)]
            k, v = (own[:, i].reshape(-1, 2, 64)[:n] for i in (0, 1))
            close(out[r], reference(q[r : r + 1], k, v)[0][0])
            at += pages[r]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size,layout", [(1, "NHD"), (5, "HND"), (16, "NHD")])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_left": 6, "logits_soft_cap": 3.0}])
def test_paged_prefill(device, dtype, page_size, layout, group, options):
    qo_lens, lens = [0, 1, 7, 20, 9, 3], [4, 1, 16, 37, 4, 0]
    paged = Paged(lens, page_size, 2, 64, dtype, layout, group != 3, device)
    q = queries(sum(qo_lens), 2 * group, 64, dtype, device)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(workspace(device), layout)
    arrays = indptr(qo_lens), *paged.table
    wrapper.plan(*arrays, 2 * group, 2, 64, page_size, q_data_type=dtype, **options)
    check(wrapper.run(q, paged.cache, return_lse=True), q, paged, qo_lens, dtype, **options)
    arrays = [x.to(device) for x in arrays]
    wrapper.plan(*arrays, 2 * group, 2, 64, page_size, q_data_type=dtype, **options)
    check(wrapper.run_return_lse(q, paged.cache), q, paged, qo_lens, dtype, **options)
    with pytest.raises(ValueError, match="rows planned"):
        wrapper.run(q[1:], paged.cache)


def random_masks(qo_lens, lens):
    return [torch.rand(n, m) < 0.6 for n, m in zip(qo_lens, lens)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window_left", [-1, 9])
def test_paged_prefill_custom_mask(device, packed, window_left):
    qo_lens, lens = [3, 0, 1, 7], [13, 5, 0, 30]
    paged = Paged(lens, 4, 2, 64, device=device)
    q = queries(sum(qo_lens), 4, 64, device=device)
    masks = random_masks(qo_lens, lens)
    masks[3][2] = False  # a row that sees nothing
    flat = torch.cat([m.flatten() for m in masks])
    ends = indptr([n * m for n, m in zip(qo_lens, lens)])
    mask = {"custom_mask": flat.to(device)}
    if packed:
        mask = {"packed_custom_mask": fi.segment_packbits(flat, ends, "little")[0].to(device)}
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(workspace(device))
    for arrays in ([indptr(qo_lens), *paged.table], [x.to(device) for x in paged.table]):
        if len(arrays) == 3:
            arrays = [indptr(qo_lens).to(device), *arrays]
        wrapper.plan(*arrays, 4, 2, 64, 4, causal=True, window_left=window_left, **mask)
        found = wrapper.run(q, paged.cache, return_lse=True)
        check(found, q, paged, qo_lens, masks=masks, window_left=window_left)
    # and the next step without one
    wrapper.plan(indptr(qo_lens), *paged.table, 4, 2, 64, 4, causal=True)
    check(wrapper.run(q, paged.cache, return_lse=True), q, paged, qo_lens, causal=True)


def test_paged_prefill_with_graph_buffers(device):
    buffers = graph_buffers(3, 40, device)
    qo_buffer = torch.zeros(4, dtype=torch.int32, device=device)
    bits = torch.zeros(4096, dtype=torch.uint8, device=device)
    mask_indptr = torch.zeros(4, dtype=torch.int32, device=device)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(
        workspace(device),
        use_cuda_graph=True,
        qo_indptr_buf=qo_buffer,
        paged_kv_indptr_buf=buffers[0],
        paged_kv_indices_buf=buffers[1],
        paged_kv_last_page_len_buf=buffers[2],
        custom_mask_buf=bits,
        mask_indptr_buf=mask_indptr,
    )
    for qo_lens, lens in [([4, 4, 4], [33, 4, 60]), ([1, 0, 8], [12, 9, 8])]:
        paged = Paged(lens, 4, 2, 64, device=device)
        q = queries(sum(qo_lens), 4, 64, device=device)
        masks = random_masks(qo_lens, lens)
        flat = torch.cat([m.flatten() for m in masks]).to(device)
        wrapper.plan(indptr(qo_lens), *paged.table, 4, 2, 64, 4, custom_mask=flat)
        check(wrapper.run(q, paged.cache, return_lse=True), q, paged, qo_lens, masks=masks)
        ends = [0, *np.cumsum([-(-n * m // 8) for n, m in zip(qo_lens, lens)])]
        assert mask_indptr.tolist() == ends
        # A plan without a mask: the buffers say it, as the caller left them.
        bits.fill_(255)
        wrapper.plan(indptr(qo_lens), *paged.table, 4, 2, 64, 4)
        check(wrapper.run(q, paged.cache, return_lse=True), q, paged, qo_lens)
    with pytest.raises(ValueError, match="max_tokens: expected at most 12"):
        paged = Paged([20, 20, 20], 4, 2, 64)
        wrapper.plan(indptr([5, 5, 5]), *paged.table, 4, 2, 64, 4)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_left": 3}])
def test_ragged_prefill(device, layout, dims, options):
    qo_lens, lens = [0, 1, 7, 20, 3], [4, 1, 16, 37, 0]
    k = queries(sum(lens), 2, dims[0], torch.bfloat16, device)
    v = queries(sum(lens), 2, dims[1], torch.bfloat16, device)
    q = queries(sum(qo_lens), 6, dims[0], torch.bfloat16, device)
    ragged = types.SimpleNamespace(k=k.split(lens), v=v.split(lens))
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(workspace(device), layout)
    if layout == "HND":
        k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    for side in ("cpu", device):
        arrays = indptr(qo_lens).to(side), indptr(lens).to(side)
        wrapper.plan(*arrays, 6, 2, *dims, q_data_type="bfloat16", **options)
        found = wrapper.run(q, k, v, return_lse=True)
        check(found, q, ragged, qo_lens, torch.bfloat16, **options)
    wrapper.plan(*arrays, 6, 2, *dims, q_data_type="bfloat16", disable_split_kv=True, **options)
    check(wrapper.run_return_lse(q, k, v), q, ragged, qo_lens, torch.bfloat16, **options)


def test_ragged_custom_mask_and_graph_buffers(device):
    qo_lens, lens = [3, 5], [9, 21]
    k, v = (queries(sum(lens), 2, 64, device=device) for _ in range(2))
    q = queries(sum(qo_lens), 4, 64, device=device)
    ragged = types.SimpleNamespace(k=k.split(lens), v=v.split(lens))
    masks = random_masks(qo_lens, lens)
    flat = torch.cat([m.flatten() for m in masks])
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(workspace(device))
    wrapper.plan(indptr(qo_lens), indptr(lens), 4, 2, 64, custom_mask=flat.to(device))
    check(wrapper.run(q, k, v, return_lse=True), q, ragged, qo_lens, masks=masks)
    buffers = [torch.zeros(3, dtype=torch.int32, device=device) for _ in range(2)]
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(
        workspace(device), "NHD", True, qo_indptr_buf=buffers[0], kv_indptr_buf=buffers[1]
    )
    wrapper.plan(indptr(qo_lens), indptr(lens), 4, 2, 64, causal=True)
    check(wrapper.run(q, k, v, return_lse=True), q, ragged, qo_lens, causal=True)
    with pytest.raises(ValueError, match="custom_mask_buf"):
        wrapper.plan(indptr(qo_lens), indptr(lens), 4, 2, 64, custom_mask=flat.to(device))


def test_forward_replaces_the_options_of_plan(device):
    """begin_forward says nothing of causal, caps or windows; each forward does."""
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(workspace(device))
    for lens in ([9, 21], [5, 30]):
        k, v = (queries(sum(lens), 2, 64, device=device) for _ in range(2))
        q = queries(8, 4, 64, device=device)
        ragged = types.SimpleNamespace(k=k.split(lens), v=v.split(lens))
        wrapper.begin_forward(indptr([3, 5]), indptr(lens), 4, 2, 64)
        for options in (
            {"causal": True, "sm_scale": 0.2},
            {"causal": True, "window_left": 4, "logits_soft_cap": 2.0},
            {},
        ):
            found = wrapper.forward_return_lse(q, k, v, **options)
            check(found, q, ragged, [3, 5], **options)
        o = wrapper.forward(q, k, v, True)
        close(o[:3], reference(q[:3], ragged.k[0], ragged.v[0], causal=True)[0])
    wrapper.end_forward()


@pytest.mark.parametrize("mode", ["ALIBI", "ROPE_LLAMA"])
def test_position_encodings(device, mode):
    paged = Paged([3, 17], 4, 2, 64, device=device)
    q = queries(6, 6, 64, device=device)
    slopes = [2.0 ** -(2 * (h + 1)) for h in range(4)] + [2.0**-1, 2.0**-3]
    if mode == "ALIBI":
        options, expected = {}, {"slopes": torch.tensor(slopes)}
    else:
        options, expected = {"rope_scale": 2.0, "rope_theta": 5e3}, {"rope": (5e3, 2.0)}
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(workspace(device))
    wrapper.plan(indptr([2, 4]), *paged.table, 6, 2, 64, 4, causal=True, pos_encoding_mode=mode, **options)
    found = wrapper.run(q, paged.cache, return_lse=True)
    check(found, q, paged, [2, 4], causal=True, **expected)
    decode = fi.BatchDecodeWithPagedKVCacheWrapper(workspace(device))
    decode.plan(*paged.table, 6, 2, 64, 4, pos_encoding_mode=mode, **options)
    check(decode.run_return_lse(q[:2], paged.cache), q[:2], paged, [1, 1], **expected)
    k, v = paged.k[1].to(device), paged.v[1].to(device)
    o, lse = fi.single_prefill_with_kv_cache_return_lse(q, k, v, causal=True, pos_encoding_mode=mode, **options)
    expected = reference(q, k, v, causal=True, **expected)
    close(o, expected[0])
    close(lse, expected[1], torch.float16)
    with pytest.raises(KeyError, match="pos_encoding_mode"):
        wrapper.forward(q, paged.cache, pos_encoding_mode="OTHER")


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_single(device, layout):
    q = queries(9, 6, 64, device=device)
    k, v = (queries(21, 2, 64, device=device) for _ in range(2))
    mask = torch.rand(9, 21) < 0.5
    options = {"window_left": 8, "logits_soft_cap": 4.0, "sm_scale": 0.2}
    kv = [x.transpose(0, 1).contiguous() if layout == "HND" else x for x in (k, v)]
    run = functools.partial(fi.single_prefill_with_kv_cache_return_lse, q, *kv, kv_layout=layout)
    for found, expected in (
        (run(), reference(q, k, v)),
        (run(causal=True, **options), reference(q, k, v, causal=True, **options)),
        (run(custom_mask=mask.to(device)), reference(q, k, v, mask=mask)),
        (run(packed_custom_mask=fi.packbits(mask.flatten(), "little").to(device)), reference(q, k, v, mask=mask)),
        (run(k_scale=0.5, v_scale=3.0), reference(q, k * 0.5, v * 3)),
    ):
        close(found[0], expected[0])
        close(found[1], expected[1], torch.float16)
    o, lse = fi.single_decode_with_kv_cache(q[0], *kv, kv_layout=layout, q_scale=2.0, return_lse=True, **options)
    expected = reference(q[:1] * 2, k, v, **options)
    close(o, expected[0][0])
    close(lse, expected[1][0], torch.float16)
    none = [x.narrow(0 if layout == "NHD" else 1, 0, 0) for x in kv]
    empty = fi.single_prefill_with_kv_cache(q, *none, kv_layout=layout)
    assert torch.equal(empty, torch.zeros_like(q))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("window_left", [-1, 5])
def test_trtllm_decode(device, layout, window_left):
    paged = Paged([1, 9, 20, 0], 4, 2, 64, torch.bfloat16, layout, True, device)
    q = queries(4, 6, 64, torch.bfloat16, device)
    tables, lens = paged.block_tables()
    sink = torch.randn(6)
    run = functools.partial(
        fi.decode.trtllm_batch_decode_with_kv_cache,
        query=q,
        kv_cache=paged.cache,
        workspace_buffer=workspace(device),
        block_tables=tables,
        seq_lens=lens,
        max_seq_len=20,
        kv_layout=layout,
        window_left=window_left,
    )
    found = run(bmm1_scale=0.1, bmm2_scale=2.0, return_lse=True)
    doubled = types.SimpleNamespace(k=paged.k, v=[2 * v for v in paged.v])
    options = {"sm_scale": 0.1, "window_left": window_left}
    check(found, q, doubled, [1] * 4, torch.bfloat16, **options)
    out = torch.empty_like(q)
    scale = torch.tensor([0.1], device=device)
    assert run(bmm1_scale=scale, bmm2_scale=scale, out=out) is out
    close(out * 20, found[0])
    found = run(bmm1_scale=0.1, sinks=sink.to(device), return_lse=True)
    check(found, q, paged, [1] * 4, torch.bfloat16, sink=sink, **options)
    assert run(bmm1_scale=0.1, out_dtype=torch.float16).dtype == torch.float16
    with pytest.raises(NotImplementedError, match="nvfp4"):
        run(out_dtype="nvfp4")


def test_trtllm_decode_of_several_rows_and_xqa(device):
    paged = Paged([6, 9, 20], 4, 2, 64, torch.bfloat16, "HND", False, device)
    tables, lens = paged.block_tables()
    q = queries(6, 6, 64, torch.bfloat16, device)
    common = paged.cache, workspace(device), tables, lens
    found = fi.decode.trtllm_batch_decode_with_kv_cache(q, *common, 20, 0.125, return_lse=True, q_len_per_req=2)
    check(found, q, paged, [2] * 3, torch.bfloat16, causal=True)
    found = fi.decode.trtllm_batch_decode_with_kv_cache(
        q,
        *common,
        20,
        0.125,
        return_lse=True,
        q_len_per_req=None,
        max_q_len=3,
        cum_seq_lens_q=indptr([3, 2, 1]).to(device),
    )
    check(found, q, paged, [3, 2, 1], torch.bfloat16, causal=True)
    o = fi.decode.xqa_batch_decode_with_kv_cache(q[:3], *common, 20, 0.125, kv_layout="HND")
    for r in range(3):
        close(o[r], reference(q[r : r + 1], paged.k[r], paged.v[r])[0][0])


def test_trtllm_context(device):
    qo_lens = [5, 1, 3]
    paged = Paged([6, 9, 20], 4, 2, 64, torch.bfloat16, "HND", True, device)
    tables, lens = paged.block_tables()
    q = queries(9, 6, 64, torch.bfloat16, device)
    out = torch.empty_like(q)
    sink = torch.randn(6)
    fi.prefill.trtllm_batch_context_with_kv_cache(
        query=q,
        kv_cache=paged.cache,
        workspace_buffer=workspace(device),
        block_tables=tables,
        seq_lens=lens,
        max_q_len=5,
        max_kv_len=20,
        bmm1_scale=0.125,
        bmm2_scale=1.0,
        batch_size=3,
        cum_seq_lens_q=indptr(qo_lens).to(device),
        cum_seq_lens_kv=indptr(paged.lens).to(device),
        window_left=7,
        sinks=sink.to(device),
        out=out,
    )
    at = 0
    for r, n in enumerate(qo_lens):
        expected = reference(q[at : at + n], paged.k[r], paged.v[r], causal=True, window_left=7, sink=sink)
        close(out[at : at + n], expected[0])
        at += n


@pytest.mark.gpu
def test_captured_trtllm_decode_plans_in_the_graph():
    """Lengths and tables that change in place are planned by the replay itself."""
    device = torch.device("cuda")
    sink = torch.randn(6, device=device)
    longest = Paged([100, 100, 100], 4, 2, 64, torch.bfloat16, "HND", True, device)
    tables, lens = longest.block_tables()
    q = queries(3, 6, 64, torch.bfloat16, device)
    out, ws = torch.empty_like(q), workspace(device)

    def step():
        fi.decode.trtllm_batch_decode_with_kv_cache(
            q, longest.cache, ws, tables, lens, 100, 0.125, 1.0, 30, out=out, sinks=sink
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now in ([5, 100, 33], [0, 1, 99]):
        lens.copy_(torch.tensor(now))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        for r, n in enumerate(now):
            k, v = longest.k[r][:n], longest.v[r][:n]
            close(out[r], reference(q[r : r + 1], k, v, window_left=30, sink=sink)[0][0])


@pytest.mark.gpu
def test_captured_prefill_reads_the_mask_buffers():
    device = torch.device("cuda")
    buffers = graph_buffers(2, 40, device)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(
        workspace(device),
        use_cuda_graph=True,
        qo_indptr_buf=torch.zeros(3, dtype=torch.int32, device=device),
        paged_kv_indptr_buf=buffers[0],
        paged_kv_indices_buf=buffers[1],
        paged_kv_last_page_len_buf=buffers[2],
        custom_mask_buf=torch.zeros(4096, dtype=torch.uint8, device=device),
        mask_indptr_buf=torch.zeros(3, dtype=torch.int32, device=device),
    )
    pool = torch.randn(40, 2, 4, 2, 64, device=device).half()
    q = queries(8, 4, 64, device=device)
    out, graph = torch.empty_like(q), None
    for lens in ([9, 40], [30, 17], [8, 70]):
        pages = [-(-n // 4) for n in lens]
        indices = torch.randperm(40)[: sum(pages)].int()
        last = torch.tensor([(n - 1) % 4 + 1 for n in lens]).int()
        masks = random_masks([4, 4], lens)
        flat = torch.cat([m.flatten() for m in masks]).to(device)
        wrapper.plan(indptr([4, 4]), indptr(pages), indices.to(device), last, 4, 2, 64, 4, custom_mask=flat)
        if graph is None:
            wrapper.run(q, pool, out=out)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                wrapper.run(q, pool, out=out)
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        at = 0
        for r, n in enumerate(lens):
            own = pool[indices[at : at + pages[r]].long().to(device)]
            k, v = (own[:, i].reshape(-1, 2, 64)[:n] for i in (0, 1))
            close(out[4 * r : 4 * r + 4], reference(q[4 * r : 4 * r + 4], k, v, mask=masks[r])[0])
            at += pages[r]
