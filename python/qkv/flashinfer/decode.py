"""Decode over a paged cache: one query row a request, or a few."""

from __future__ import annotations

from typing import Any
from collections.abc import Sequence

import torch

from ._missing import missing, refuse
from ._operator import (
    Cache,
    Model,
    Options,
    as_scale,
    data_types,
    full_last_page,
    run,
    shared_operator,
    split_cache,
    together,
)
from ._wrapper import Wrapper, check_buffer, fill_buffers
from .page import get_seq_lens as get_seq_lens
from .utils import FP4Tensor, _get_range_buf as _get_range_buf, canonicalize_torch_dtype, steps


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    """Attention of the last token(s) of each request over its pages.

    With use_cuda_graph the batch size is that of the buffers, plan copies a step's arrays into
    them and plans from there (on a GPU by a kernel), so that a captured run stays valid."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, jit_args)
        self._use_tensor_cores = use_tensor_cores
        self._backend = backend
        self._paged_kv_indptr_buf = paged_kv_indptr_buffer
        self._paged_kv_indices_buf = paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer
        self._q_len = 1
        self._fixed_batch_size = 0
        if use_cuda_graph:
            check_buffer("paged_kv_indices_buffer", paged_kv_indices_buffer)
            check_buffer("paged_kv_last_page_len_buffer", paged_kv_last_page_len_buffer)
            self._fixed_batch_size = len(paged_kv_last_page_len_buffer)
            check_buffer("paged_kv_indptr_buffer", paged_kv_indptr_buffer, self._fixed_batch_size + 1)

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str | None = "float16",
        kv_data_type: torch.dtype | str | None = None,
        data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        *,
        o_data_type: torch.dtype | str | None = None,
        window_right: int = 0,
        q_len_per_req: int | None = 1,
    ) -> None:
        """Takes a step's page table: indptr [batch + 1], indices [>= indptr[batch]],
        last_page_len [batch] (0: a full page), on the host or the GPU.

        block_tables and seq_lens say the same again and are not looked at. Splits are planned by
        qkv; fixed_split_size or disable_split_kv make a request's bits independent of the batch."""
        if window_right not in (0, -1):
            raise NotImplementedError(f"window_right: expected 0 or -1, got {window_right}")
        batch_size, q_len = len(last_page_len), q_len_per_req or 1
        if self.is_cuda_graph_enabled:
            buffers = (self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf)
            fill_buffers(buffers, (indptr, indices, last_page_len), page_size, non_blocking)
        else:
            arrays = together(self.device, indptr, indices, last_page_len, non_blocking=non_blocking)
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf = arrays[:2]
            self._paged_kv_last_page_len_buf = full_last_page(arrays[2], page_size)
        self._remember(q_len > 1, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        q_type, kv_type, o_type = data_types(q_data_type, kv_data_type, o_data_type, data_type)
        self._model = Model(
            num_qo_heads,
            num_kv_heads,
            head_dim,
            head_dim,
            page_size,
            self._kv_layout,
            q_type,
            kv_type,
            o_type,
            batch_invariant=disable_split_kv or (fixed_split_size or -1) > 0,
        )
        self._batch_size = batch_size
        self._plan_rows(q_len)

    begin_forward = plan

    def _plan_rows(self, q_len: int) -> None:
        self._q_len = q_len
        indptr = self._paged_kv_indptr_buf
        self._plan(
            self._model._replace(max_qo_len=q_len),
            {
                "max_requests": self._batch_size,
                "max_tokens": self._batch_size * q_len,
                "max_pages": len(self._paged_kv_indices_buf),
            },
            {
                "qo_indptr": steps(self._batch_size, q_len, indptr.device),
                "kv_indptr": indptr,
                "kv_indices": self._paged_kv_indices_buf,
                "kv_last_page_len": self._paged_kv_last_page_len_buf,
            },
        )

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Cache,
        *args: Any,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """out [batch * q_len, num_qo_heads, head_dim], and with return_lse (out, lse) with lse f32
        [batch * q_len, num_qo_heads] in base 2. paged_kv_cache: [pages, 2, ...] or (k, v).
        skip_softmax_threshold_scale_factor permits an approximation that is not made."""
        refuse(kv_cache_sf=kv_cache_sf)
        if q_len_per_req not in (None, self._q_len):
            self._causal = q_len_per_req > 1
            self._plain = self._options(self._window_left, False)
            self._plan_rows(q_len_per_req)
        return self._run(
            q,
            paged_kv_cache,
            args,
            out=out,
            lse=lse,
            return_lse=return_lse,
            window_left=window_left,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            sinks=sinks,
        )

    def run_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, return_lse=True, **kwargs)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: Cache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """run with options that replace those of plan."""
        self._remember(self._causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    def forward_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, return_lse=True, **kwargs)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """The same with the buffers in front."""

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer, last_page_len_buffer
        )


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: torch.dtype | str | None = None,
    kv_data_type: torch.dtype | str | None = None,
    data_type: torch.dtype | str | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    global_override_indptr_cpu: torch.Tensor | None = None,
) -> None:
    """plan, which copies nothing to the host and so needs no other form:
    global_override_indptr_cpu, a copy of indptr on the host, is not looked at."""
    BatchDecodeWithPagedKVCacheWrapper.plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        pos_encoding_mode,
        window_left,
        logits_soft_cap,
        q_data_type,
        kv_data_type,
        data_type,
        sm_scale,
        rope_scale,
        rope_theta,
        non_blocking,
        fixed_split_size=fixed_split_size,
        disable_split_kv=disable_split_kv,
    )


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Any:
    """One row q [num_qo_heads, head_dim] over k and v [kv_len, num_kv_heads, head_dim] (by
    kv_layout): out [num_qo_heads, head_dim], or (out, lse [num_qo_heads])."""
    from .prefill import single_prefill_with_kv_cache

    found = single_prefill_with_kv_cache(
        q[None],
        k,
        v,
        scale_q=q_scale,
        scale_k=k_scale,
        scale_v=v_scale,
        kv_layout=kv_layout,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        return_lse=return_lse,
    )
    return (found[0][0], found[1][0]) if return_lse else found[0]


def block_table_attention(
    query: torch.Tensor,
    kv_cache: Cache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    qo_indptr: torch.Tensor,
    *,
    max_qo_len: int,
    bmm1_scale: float | torch.Tensor,
    bmm2_scale: float | torch.Tensor,
    window_left: int,
    out: torch.Tensor | None,
    out_dtype: torch.dtype | str | None,
    sinks: torch.Tensor | Sequence[torch.Tensor] | None,
    kv_layout: str,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Plan and run in one call: a plan kernel reads lengths and tables where they are, so that the
    call can be captured. Operators belong to the workspace, which one stream uses at a time."""
    if isinstance(out, FP4Tensor) or out_dtype == "nvfp4":
        raise NotImplementedError("out_dtype: nvfp4 is not offered by qkv.flashinfer")
    if out is not None:
        o_type = out.dtype
    else:
        o_type = query.dtype if out_dtype is None else canonicalize_torch_dtype(out_dtype)
    if block_tables.ndim != 2:
        raise NotImplementedError("block_tables: expected [batch, pages], separate tables for k and v are not offered")
    if isinstance(sinks, (list, tuple)):
        (sinks,) = sinks
    k, v = split_cache(kv_cache)
    shape = k.shape if v is not None else k.shape[:1] + k.shape[2:]
    page_size, num_kv_heads = (shape[1], shape[2]) if kv_layout == "NHD" else (shape[2], shape[1])
    query = query.reshape(-1, *query.shape[-2:])
    tokens, num_qo_heads, head_dim = query.shape
    model = Model(
        num_qo_heads,
        num_kv_heads,
        head_dim,
        (k if v is None else v).shape[-1],
        page_size,
        kv_layout,
        query.dtype,
        k.dtype,
        o_type,
        max_qo_len=max_qo_len,
    )
    tables, lens, indptr = together(query.device, block_tables, seq_lens, qo_indptr)
    batch = {"qo_indptr": indptr, "block_table": tables, "kv_lens": lens}
    need = {"max_requests": len(lens), "max_tokens": tokens, "max_pages": tables.numel()}
    operator = shared_operator(query.device, workspace_buffer.data_ptr())
    operator.set(model, need, batch)
    # A scale in device memory multiplies q; a number is the scale of the logits.
    on_device = isinstance(bmm1_scale, torch.Tensor)
    shaped = None if out is None else out.view(tokens, num_qo_heads, model.head_dim_vo)
    found = run(
        operator,
        Options(causal=max_qo_len != 1, window_left=window_left, sink=sinks is not None),
        query,
        k,
        v,
        out=shaped,
        lse=(True if lse is None else lse) if return_lse else None,
        sm_scale=1.0 if on_device else bmm1_scale,
        q_scale=as_scale(bmm1_scale) if on_device else None,
        v_scale=bmm2_scale,
        sinks=None if sinks is None else sinks.float(),
    )
    if out is None:
        return found
    return (out, found[1]) if return_lse else out


def trtllm_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: Cache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int | None = None,
    bmm1_scale: float | torch.Tensor = 1.0,
    bmm2_scale: float | torch.Tensor = 1.0,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | str | None = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    sinks: torch.Tensor | Sequence[torch.Tensor] | None = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    backend: str = "auto",
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: torch.Tensor | None = None,
    max_q_len: int | None = None,
    cum_seq_lens_q: torch.Tensor | None = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    kv_cache_sf: Any = None,
    uses_shared_paged_kv_idx: bool = True,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """query [tokens, num_qo_heads, head_dim] over block_tables [batch, pages] and seq_lens [batch].

    bmm1_scale scales the logits (sm_scale times the scales of q and k), bmm2_scale the output; a
    number or a tensor of one f32. sinks f32 [num_qo_heads]. Each request has q_len_per_req rows,
    or those that cum_seq_lens_q [batch + 1] gives it, causal among themselves. o_scale is how an
    fp8 kernel splits bmm2_scale; the result does not depend on it."""
    refuse(o_sf_scale=o_sf_scale, o_sf_vec_size=o_sf_vec_size, mask=mask, kv_cache_sf=kv_cache_sf)
    if cum_seq_lens_q is None:
        max_qo_len = q_len_per_req or 1
        qo_indptr = steps(len(seq_lens), max_qo_len, seq_lens.device)
    else:
        max_qo_len, qo_indptr = max_q_len or 0, cum_seq_lens_q
    return block_table_attention(
        query,
        kv_cache,
        workspace_buffer,
        block_tables,
        seq_lens,
        qo_indptr,
        max_qo_len=max_qo_len,
        bmm1_scale=bmm1_scale,
        bmm2_scale=bmm2_scale,
        window_left=window_left,
        out=out,
        out_dtype=out_dtype,
        sinks=sinks,
        kv_layout=kv_layout,
        lse=lse,
        return_lse=return_lse,
    )


def xqa_batch_decode_with_kv_cache(
    query: torch.Tensor,
    kv_cache: Cache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seq_len: int | None = None,
    bmm1_scale: float | torch.Tensor = 1.0,
    bmm2_scale: float | torch.Tensor = 1.0,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_layout: str = "NHD",
    enable_pdl: bool | None = None,
    q_len_per_req: int | None = 1,
    o_scale: float | None = 1.0,
    mask: torch.Tensor | None = None,
    kv_cache_sf: Any = None,
) -> torch.Tensor:
    """trtllm_batch_decode_with_kv_cache with another default layout."""
    return trtllm_batch_decode_with_kv_cache(
        query,
        kv_cache,
        workspace_buffer,
        block_tables,
        seq_lens,
        max_seq_len,
        bmm1_scale,
        bmm2_scale,
        window_left,
        out,
        sinks=sinks,
        kv_layout=kv_layout,
        q_len_per_req=q_len_per_req,
        o_scale=o_scale,
        mask=mask,
        kv_cache_sf=kv_cache_sf,
    )


__getattr__ = missing(__name__)
