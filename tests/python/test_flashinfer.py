"""qkv.flashinfer as flashinfer: install(), what is not offered, and the calls that engines make."""

import functools
import importlib
import importlib.util
import math
import sys
import types

import pytest
import torch
from flashinfer_reference import Paged, check, close, graph_buffers, indptr, queries, reference, workspace

import qkv.flashinfer as fi
import qkv.logits_processor


@pytest.fixture
def installed():
    fi.install()
    yield
    fi.uninstall()


def test_install(installed):
    import flashinfer
    import flashinfer.decode
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    from flashinfer.attention import BatchAttention
    from flashinfer.cascade import merge_state
    from flashinfer.decode import _get_range_buf, get_seq_lens
    from flashinfer.page import append_paged_kv_cache
    from flashinfer.sampling import top_k_top_p_sampling_from_probs
    from flashinfer.utils import FP4Tensor, PosEncodingMode

    assert flashinfer is fi and flashinfer.decode is fi.decode
    assert BatchDecodeWithPagedKVCacheWrapper is fi.BatchDecodeWithPagedKVCacheWrapper
    assert BatchAttention is fi.BatchAttention and merge_state is fi.merge_state
    assert top_k_top_p_sampling_from_probs is fi.top_k_top_p_sampling_from_probs
    assert append_paged_kv_cache is fi.append_paged_kv_cache
    assert get_seq_lens is fi.get_seq_lens and PosEncodingMode.ALIBI.value == 2
    assert _get_range_buf(4, "cpu").tolist() == [0, 1, 2, 3]
    assert importlib.util.find_spec("flashinfer") is not None
    assert importlib.util.find_spec("flashinfer.fused_moe") is None
    with pytest.raises(NotImplementedError, match="FP4Tensor"):
        FP4Tensor(None, None)
    assert tuple(map(int, flashinfer.__version__.split("."))) >= (0, 2, 3)


def test_what_is_not_offered_names_itself(installed):
    import flashinfer

    for module, name in (
        (flashinfer, "fused_moe"),
        (flashinfer, "mm_fp4"),
        (flashinfer.decode, "BatchDecodeMlaWithPagedKVCacheWrapper"),
        (flashinfer.sampling, "tree_speculative_sampling"),
    ):
        with pytest.raises(NotImplementedError, match=f"flashinfer.*{name}"):
            getattr(module, name)
        assert not hasattr(module, name) and getattr(module, name, None) is None
    with pytest.raises(ImportError, match="mm_fp4"):
        from flashinfer import mm_fp4  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="flashinfer.fused_moe"):
        import flashinfer.fused_moe  # noqa: F401
    ws = torch.empty(1, dtype=torch.uint8)
    with pytest.raises(NotImplementedError, match="jit_args"):
        fi.BatchPrefillWithPagedKVCacheWrapper(ws, jit_args=["a"])
    with pytest.raises(KeyError, match="kv_layout"):
        fi.BatchPrefillWithPagedKVCacheWrapper(ws, "DHN")
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(ws)
    paged = Paged([3], 4, 1, 64)
    with pytest.raises(NotImplementedError, match="prefix_len_ptr"):
        wrapper.plan(indptr([1]), *paged.table, 1, 1, 64, 4, prefix_len_ptr=torch.zeros(1))
    for wrapper in (fi.BatchDecodeWithPagedKVCacheWrapper, fi.BatchPrefillWithPagedKVCacheWrapper):
        with pytest.raises(RuntimeError, match="plan to be called first"):
            wrapper(ws).run(queries(1, 1, 64), paged.cache)


def test_logits_processor(installed):
    from flashinfer.logits_processor import LogitsPipe, Sample, Softmax, Temperature, TopP

    for stage in (LogitsPipe, Sample, Softmax, Temperature, TopP):
        assert stage is getattr(qkv.logits_processor, stage.__name__)
    assert not hasattr(fi.logits_processor, "NoSuchStage")


def test_install_beside_the_real_package(monkeypatch):
    real, real_decode = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.decode")
    monkeypatch.setitem(sys.modules, "flashinfer", real)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", real_decode)
    with pytest.raises(ImportError, match="force=True"):
        fi.install()
    fi.uninstall()
    assert sys.modules["flashinfer"] is real
    fi.install(force=True)
    assert sys.modules["flashinfer"] is fi and sys.modules["flashinfer.decode"] is fi.decode
    fi.install()
    fi.uninstall()
    assert "flashinfer" not in sys.modules and "flashinfer.decode" not in sys.modules


def test_vllm_step(device, installed):
    """Decodes at the front, prefills at the back; a padded graph batch; options asserted on the
    wrapper; a cache that is a permuted view; lengths on the host, page indices on the GPU."""
    import flashinfer

    page_size, layout = 16, "HND"
    lens, qo_lens = [20, 33, 40, 16], [1, 1, 7, 16]
    paged = Paged(lens, page_size, 2, 64, torch.bfloat16, "NHD", True, device)
    physical = paged.cache.permute(0, 1, 3, 2, 4).contiguous()
    cache = physical.permute(0, 1, 3, 2, 4).permute(0, 1, 3, 2, 4)
    scale, q_type = 0.17, torch.bfloat16
    options = {
        "sm_scale": scale,
        "window_left": -1,
        "logits_soft_cap": None,
        "q_data_type": q_type,
        "kv_data_type": q_type,
        "disable_split_kv": False,
        "fixed_split_size": -1,
    }
    q = queries(sum(qo_lens), 4, 64, q_type, device)
    out = torch.full_like(q, math.nan)
    indices = paged.indices.to(device)

    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device), layout)
    qo_indptr = indptr(qo_lens)[2:] - 2
    prefill.plan(qo_indptr, paged.indptr[2:], indices, paged.last[2:], 4, 2, 64, page_size, causal=True, **options)
    assert prefill._causal and prefill._window_left == -1
    assert prefill._logits_soft_cap == 0.0 and prefill._sm_scale == scale
    prefill.run(q[2:], cache, k_scale=1.0, v_scale=1.0, out=out[2:])

    batch = 4  # padded from 2
    padded = torch.cat([paged.indptr[:3], paged.indptr[2:3].repeat(2)])
    last = torch.cat([paged.last[:2], torch.ones(2, dtype=torch.int32)])
    buffers = graph_buffers(batch, 64, device)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace(device),
        layout,
        use_cuda_graph=True,
        paged_kv_indptr_buffer=buffers[0],
        paged_kv_indices_buffer=buffers[1],
        paged_kv_last_page_len_buffer=buffers[2],
        use_tensor_cores=True,
    )
    positional = ("NONE", -1, None, q_type, q_type, None, scale, None, None, True, None, None, -1)
    decode.plan(padded, indices, last, 4, 2, 64, page_size, *positional, False)
    rows = torch.cat([q[:2], torch.zeros_like(q[:2])])
    result = decode.run(rows, cache, k_scale=1.0, v_scale=1.0)
    out[:2] = result[:2]
    assert decode._window_left == -1 and decode._sm_scale == scale
    at = 0
    for r, n in enumerate(qo_lens):
        expected = reference(q[at : at + n], paged.k[r], paged.v[r], causal=True, sm_scale=scale)
        close(out[at : at + n], expected[0])
        at += n

    # The engine's own fast plan: it copies lengths into the buffers and calls the planner.
    decode._paged_kv_indptr_buf.copy_(torch.tensor([0, 2, 2, 2, 2], dtype=torch.int32))
    decode._plan_info = decode._cached_module.plan(decode._float_workspace_buffer, *range(17))
    result = decode.run(rows, cache)
    close(result[0], out[0].double())
    assert not result[1:].any()


def test_sglang_step(device, installed):
    """Pages of one token, arrays on the GPU, begin_forward without options and forward with them;
    prefix and new tokens apart and merged; graphs that are replanned through fast_decode_plan."""
    from flashinfer import (
        BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper,
        BatchPrefillWithRaggedKVCacheWrapper,
        fast_decode_plan,
    )
    from flashinfer.cascade import merge_state

    q_type = torch.bfloat16
    prefix, new = [5, 0, 12], [3, 4, 1]
    lens = [a + b for a, b in zip(prefix, new)]
    paged = Paged(lens, 1, 2, 64, q_type, "NHD", False, device)
    on_device = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    ones = on_device([1, 1, 1])
    kv_indices = on_device(sum((t[:n] for t, n in zip(paged.tables, prefix)), []) + [0] * 256)
    ragged = BatchPrefillWithRaggedKVCacheWrapper(workspace(device), "NHD", backend="auto")
    cached = BatchPrefillWithPagedKVCacheWrapper(workspace(device), "NHD", backend="fa2")
    q = queries(sum(new), 4, 64, q_type, device)
    qo_indptr, kv_indptr = indptr(new).to(device), indptr(prefix).to(device)
    k = torch.cat([x[n:] for x, n in zip(paged.k, prefix)]).to(device)
    v = torch.cat([x[n:] for x, n in zip(paged.v, prefix)]).to(device)
    for _ in range(2):  # steps
        ragged.begin_forward(qo_indptr, qo_indptr, 4, 2, 64, q_data_type=q_type)
        cached.begin_forward(
            qo_indptr,
            kv_indptr,
            kv_indices,
            ones,
            4,
            2,
            64,
            1,
            q_data_type=q_type,
            kv_data_type=q_type,
            custom_mask=None,
            non_blocking=True,
            fixed_split_size=None,
            prefix_len_ptr=None,
            token_pos_in_items_ptr=None,
            token_pos_in_items_len=0,
            max_item_len_ptr=None,
        )
        for cap in (0.0, 2.0):  # layers
            common = {"sm_scale": 0.2, "window_left": -1, "logits_soft_cap": cap}
            o1, s1 = ragged.forward_return_lse(q, k, v, causal=True, **common)
            o2, s2 = cached.forward_return_lse(q, paged.cache, causal=False, **common)
            check(merge_state(o1, s1, o2, s2), q, paged, new, q_type, causal=True, sm_scale=0.2, logits_soft_cap=cap)

    buffers = on_device([0] * 4), on_device([0] * 256), ones
    decode = BatchDecodeWithPagedKVCacheWrapper(
        workspace(device),
        "NHD",
        backend="fa2",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=buffers[0],
        paged_kv_indices_buffer=buffers[1],
        paged_kv_last_page_len_buffer=buffers[2],
    )
    q = queries(3, 4, 64, q_type, device)
    for step in range(3):
        kv_indptr = buffers[0]
        kv_indptr.copy_(paged.indptr)
        indices = decode._paged_kv_indices_buf  # written in place
        indices[: len(paged.indices)].copy_(paged.indices)
        options = {"data_type": q_type, "q_data_type": q_type, "non_blocking": True}
        if step > 0:
            decode.begin_forward = functools.partial(fast_decode_plan, decode)
            assert decode.begin_forward.func == fast_decode_plan
            options["global_override_indptr_cpu"] = paged.indptr
        decode.begin_forward(
            kv_indptr, indices, ones, 4, 2, 64, 1, fixed_split_size=None, disable_split_kv=False, **options
        )
        o = decode.forward(q, paged.cache, sm_scale=0.2, logits_soft_cap=0.0, k_scale=None, v_scale=None)
        for r in range(3):
            expected = reference(q[r : r + 1], paged.k[r], paged.v[r], sm_scale=0.2)
            close(o[r], expected[0][0])
        order = torch.randperm(3).tolist()
        paged = Paged([lens[i] + step for i in order], 1, 2, 64, q_type, "NHD", False, device)


def test_tensorrt_llm_step(device, installed):
    """Positions, append, and mixed batches; the small operators."""
    import flashinfer

    lens, new = [9, 4, 30], [1, 4, 1]
    paged = Paged(lens, 8, 2, 64, torch.bfloat16, "NHD", True, device)
    table = [x.to(device) for x in paged.table]
    rows, positions = flashinfer.page.get_batch_indices_positions(
        indptr(new).to(device), flashinfer.get_seq_lens(table[0], table[2], 8), sum(new)
    )
    cache = paged.cache.clone()
    k, v = (torch.cat([x[len(x) - n :] for x, n in zip(each, new)]).to(device) for each in (paged.k, paged.v))
    for r, (n, length) in enumerate(zip(new, lens)):
        for t in range(length - n, length):
            cache[paged.tables[r][t // 8], :, t % 8] = math.nan
    flashinfer.append_paged_kv_cache(
        append_key=k,
        append_value=v,
        batch_indices=rows,
        positions=positions,
        paged_kv_cache=cache,
        kv_indices=table[1],
        kv_indptr=table[0],
        kv_last_page_len=table[2],
        kv_layout="NHD",
    )
    assert torch.equal(cache.nan_to_num(7.0), paged.cache.nan_to_num(7.0))
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device), "NHD", backend="fa2")
    wrapper.plan(
        indptr(new).to(device),
        *table,
        4,
        2,
        64,
        8,
        causal=True,
        sm_scale=0.2,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    q = queries(sum(new), 4, 64, torch.bfloat16, device)
    found = wrapper.run(q, cache, return_lse=True)
    check(found, q, paged, new, torch.bfloat16, causal=True, sm_scale=0.2)
