"""Prefill and append: rows of queries of each request over its pages, or over ragged keys."""

from __future__ import annotations

import functools
from typing import Any
from collections.abc import Callable, Sequence

import torch

from ._missing import missing, refuse
from ._operator import Cache, Model, Options, data_types, full_last_page, run, shared_operator, together
from ._wrapper import Wrapper, check_batch_size, check_buffer, fill_buffers
from .decode import block_table_attention
from .page import get_seq_lens as get_seq_lens
from .quantization import packbits, segment_packbits


def mask_arguments(
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    custom_mask: torch.Tensor | None,
    packed_custom_mask: torch.Tensor | None,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """mask_bits (on the device) and mask_indptr (where rows and kv_lens are) of Attention.plan.

    rows, kv_lens [requests]; custom_mask bool [sum of rows * kv_lens]; packed_custom_mask u8, each
    request from a byte of its own on, lowest bit first."""
    lens = rows.to(torch.int64) * kv_lens
    indptr = torch.zeros(len(lens) + 1, dtype=torch.int64, device=lens.device)
    if packed_custom_mask is not None:
        torch.cumsum((lens + 7) // 8, 0, out=indptr[1:])
        return {"mask_bits": packed_custom_mask.to(device), "mask_indptr": indptr}
    torch.cumsum(lens, 0, out=indptr[1:])
    bits, byte_indptr = segment_packbits(custom_mask.reshape(-1), indptr, "little")
    return {"mask_bits": bits.to(device), "mask_indptr": byte_indptr}


class _BatchPrefill(Wrapper):
    """What the paged and the ragged wrapper share."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        qo_indptr_buf: torch.Tensor | None,
        custom_mask_buf: torch.Tensor | None,
        mask_indptr_buf: torch.Tensor | None,
        backend: str,
        jit_args: Any,
        jit_kwargs: Any,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, jit_args, jit_kwargs)
        self._backend = backend
        self._qo_indptr_buf = qo_indptr_buf
        self._custom_mask_buf = custom_mask_buf
        self._mask_indptr_buf = mask_indptr_buf
        self._fixed_batch_size = 0
        if use_cuda_graph:
            check_buffer("qo_indptr_buf", qo_indptr_buf)
            self._fixed_batch_size = len(qo_indptr_buf) - 1
            if (custom_mask_buf is None) != (mask_indptr_buf is None):
                raise ValueError("custom_mask_buf, mask_indptr_buf: expected both or neither")
            if custom_mask_buf is not None:
                # Byte offsets as qkv reads them, at an address that stays.
                self._mask_indptr = torch.zeros_like(mask_indptr_buf, dtype=torch.int64)

    def _plan_mask(
        self,
        kv_lens: Callable[[], torch.Tensor],
        custom_mask: torch.Tensor | None,
        packed_custom_mask: torch.Tensor | None,
        non_blocking: bool,
    ) -> dict[str, torch.Tensor]:
        """Arguments of Attention.plan. For graphs the buffers decide: given, they hold the mask of
        each step, whether this plan brings one or the caller wrote it there."""
        given = custom_mask is not None or packed_custom_mask is not None
        if not self.is_cuda_graph_enabled:
            self._custom_mask_buf = None
            if not given:
                return {}
        elif self._custom_mask_buf is None:
            if given:
                raise ValueError("custom_mask_buf: expected a buffer at creation to plan a mask")
            return {}
        if given:
            mask = mask_arguments(self._qo_indptr_buf.diff(), kv_lens(), custom_mask, packed_custom_mask, self.device)
            if not self.is_cuda_graph_enabled:
                self._custom_mask_buf = mask["mask_bits"]
                return mask
            bits = mask["mask_bits"]
            self._custom_mask_buf[: len(bits)].copy_(bits, non_blocking=non_blocking)
            self._mask_indptr_buf.copy_(mask["mask_indptr"], non_blocking=non_blocking)
        self._mask_indptr.copy_(self._mask_indptr_buf)
        return {"mask_bits": self._custom_mask_buf, "mask_indptr": self._mask_indptr}

    def _forward(
        self,
        *operands: Any,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        **scales: Any,
    ) -> Any:
        self._remember(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(*operands, **scales)

    def run_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, return_lse=True, **kwargs)

    def forward_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, return_lse=True, **kwargs)


class BatchPrefillWithPagedKVCacheWrapper(_BatchPrefill):
    """Attention of the last rows of each request over its pages.

    With use_cuda_graph the batch size is that of the buffers, plan copies a step's arrays into
    them and plans from there (on a GPU by a kernel), so that a captured run stays valid; q has at
    most the rows of the first plan."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
    ) -> None:
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            qo_indptr_buf,
            custom_mask_buf,
            mask_indptr_buf,
            backend,
            jit_args,
            jit_kwargs,
        )
        self._paged_kv_indptr_buf = paged_kv_indptr_buf
        self._paged_kv_indices_buf = paged_kv_indices_buf
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buf
        if use_cuda_graph:
            check_buffer("paged_kv_indptr_buf", paged_kv_indptr_buf, self._fixed_batch_size + 1)
            check_buffer("paged_kv_indices_buf", paged_kv_indices_buf)
            check_buffer("paged_kv_last_page_len_buf", paged_kv_last_page_len_buf, self._fixed_batch_size)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Takes a step's rows qo_indptr [batch + 1] and page table, as the decode wrapper's, on
        the host or the GPU (then the number of rows is read from it, which waits for the stream).

        custom_mask: bool, each request's [rows, kv_len] flattened, one after the other; it
        replaces causal. packed_custom_mask: the same as bits, lowest of a byte first, each request
        from a byte of its own on. seq_lens, seq_lens_q, block_tables and the maxima say the same
        again and are not looked at."""
        refuse(
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            max_item_len_ptr=max_item_len_ptr,
        )
        batch_size = len(qo_indptr) - 1
        rows = int(qo_indptr[-1])
        arrays = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        if self.is_cuda_graph_enabled:
            buffers = (
                self._qo_indptr_buf,
                self._paged_kv_indptr_buf,
                self._paged_kv_indices_buf,
                self._paged_kv_last_page_len_buf,
            )
            fill_buffers(buffers, arrays, page_size, non_blocking)
        else:
            arrays = together(self.device, *arrays, non_blocking=non_blocking)
            self._qo_indptr_buf, self._paged_kv_indptr_buf, self._paged_kv_indices_buf = arrays[:3]
            self._paged_kv_last_page_len_buf = full_last_page(arrays[3], page_size)

        def kv_lens() -> torch.Tensor:
            pages = self._paged_kv_indptr_buf.diff()
            used = (pages - 1) * page_size + self._paged_kv_last_page_len_buf
            return torch.where(pages > 0, used, 0)

        mask = self._plan_mask(kv_lens, custom_mask, packed_custom_mask, non_blocking)
        self._remember(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        q_type, kv_type, o_type = data_types(q_data_type, kv_data_type, o_data_type)
        self._plan(
            Model(
                num_qo_heads,
                num_kv_heads,
                head_dim_qk,
                head_dim_vo or head_dim_qk,
                page_size,
                self._kv_layout,
                q_type,
                kv_type,
                o_type,
                batch_invariant=disable_split_kv or (fixed_split_size or -1) > 0,
                custom_mask=bool(mask),
            ),
            {"max_requests": batch_size, "max_tokens": rows, "max_pages": len(self._paged_kv_indices_buf)},
            {
                "qo_indptr": self._qo_indptr_buf,
                "kv_indptr": self._paged_kv_indptr_buf,
                "kv_indices": self._paged_kv_indices_buf,
                "kv_last_page_len": self._paged_kv_last_page_len_buf,
                **mask,
            },
        )

    begin_forward = plan

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
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """out [rows, num_qo_heads, head_dim_vo], and with return_lse (out, lse) with lse f32
        [rows, num_qo_heads] in base 2. paged_kv_cache: [pages, 2, ...] or (k, v)."""
        refuse(kv_cache_sf=kv_cache_sf)
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

    def forward(self, q: torch.Tensor, paged_kv_cache: Cache, *args: Any, **kwargs: Any) -> Any:
        """run with causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale
        and rope_theta that replace those of plan."""
        return self._forward(q, paged_kv_cache, **_named(args, kwargs))


class BatchPrefillWithRaggedKVCacheWrapper(_BatchPrefill):
    """Attention over keys and values that lie one request after the other."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
    ) -> None:
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            qo_indptr_buf,
            custom_mask_buf,
            mask_indptr_buf,
            backend,
            jit_args,
            jit_kwargs,
        )
        self._kv_indptr_buf = kv_indptr_buf
        if use_cuda_graph:
            check_buffer("kv_indptr_buf", kv_indptr_buf, self._fixed_batch_size + 1)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: torch.Tensor | None = None,
        o_indptr: torch.Tensor | None = None,
    ) -> None:
        """Takes a step's rows qo_indptr and keys kv_indptr, both [batch + 1], on the host or the
        GPU (then their last entries are read, which waits for the stream)."""
        refuse(
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            max_item_len_ptr=max_item_len_ptr,
            v_indptr=v_indptr,
            o_indptr=o_indptr,
        )
        batch_size = len(qo_indptr) - 1
        rows = int(qo_indptr[-1])
        if self.is_cuda_graph_enabled:
            check_batch_size("qo_indptr", self._fixed_batch_size, batch_size)
            self._qo_indptr_buf.copy_(qo_indptr, non_blocking=non_blocking)
            self._kv_indptr_buf.copy_(kv_indptr, non_blocking=non_blocking)
        else:
            self._qo_indptr_buf, self._kv_indptr_buf = together(
                self.device, qo_indptr, kv_indptr, non_blocking=non_blocking
            )
        mask = self._plan_mask(self._kv_indptr_buf.diff, custom_mask, packed_custom_mask, non_blocking)
        self._remember(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        q_type, kv_type, o_type = data_types(q_data_type, kv_data_type, o_data_type)
        invariant = disable_split_kv or (fixed_split_size or -1) > 0
        need = {"max_requests": batch_size, "max_tokens": rows, "max_pages": 0}
        if invariant:
            need["max_kv_len"] = int(kv_indptr[-1])
        self._plan(
            Model(
                num_qo_heads,
                num_kv_heads,
                head_dim_qk,
                head_dim_vo or head_dim_qk,
                0,
                self._kv_layout,
                q_type,
                kv_type,
                o_type,
                batch_invariant=invariant,
                custom_mask=bool(mask),
            ),
            need,
            {"qo_indptr": self._qo_indptr_buf, "kv_indptr": self._kv_indptr_buf, **mask},
        )

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        o_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """q [rows, num_qo_heads, head_dim_qk], k and v [tokens, num_kv_heads, head_dim] (by
        kv_layout): out [rows, num_qo_heads, head_dim_vo], or (out, lse)."""
        refuse(kv_cache_sf=kv_cache_sf, o_scale=None if o_scale == 1.0 else o_scale)
        return self._run(
            q, (k, v), args, out=out, lse=lse, return_lse=return_lse, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """run with causal and the other options that replace those of plan."""
        return self._forward(q, k, v, **_named(args, kwargs))


def _named(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The leading options of forward, which may come by position."""
    return dict(zip(("causal", "pos_encoding_mode", "use_fp16_qk_reduction"), args)) | kwargs


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: torch.Tensor | float | None = None,
    scale_k: torch.Tensor | float | None = None,
    scale_v: torch.Tensor | float | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: Any = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> Any:
    """q [qo_len, num_qo_heads, head_dim_qk] over k, v [kv_len, num_kv_heads, head_dim] (by
    kv_layout): out [qo_len, num_qo_heads, head_dim_vo], or (out, lse [qo_len, num_qo_heads]).
    custom_mask bool [qo_len, kv_len], or its bits, lowest of a byte first."""
    refuse(kv_cache_sf=kv_cache_sf)
    qo_len, num_qo_heads, head_dim_qk = q.shape
    kv_len, num_kv_heads = k.shape[:2] if kv_layout == "NHD" else (k.shape[1], k.shape[0])
    batch: dict[str, Any] = {
        "qo_indptr": torch.tensor([0, qo_len], dtype=torch.int32),
        "kv_indptr": torch.tensor([0, kv_len], dtype=torch.int32),
    }
    if custom_mask is not None:
        packed_custom_mask = packbits(custom_mask, "little")
    if packed_custom_mask is not None:
        batch["mask_bits"] = packed_custom_mask.to(q.device)
        batch["mask_indptr"] = torch.tensor([0, packed_custom_mask.numel()], dtype=torch.int64)
    operator = shared_operator(q.device)
    operator.set(
        Model(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            v.shape[-1],
            0,
            kv_layout,
            q.dtype,
            k.dtype,
            o_dtype or q.dtype,
            max_qo_len=1 if qo_len == 1 else 0,
            custom_mask=packed_custom_mask is not None,
        ),
        {"max_requests": 1, "max_tokens": qo_len, "max_pages": 0},
        batch,
    )
    return run(
        operator,
        Options.make(causal, window_left, logits_soft_cap, pos_encoding_mode, rope_scale, rope_theta),
        q,
        k,
        v,
        out=None,
        lse=True if return_lse else None,
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        q_scale=scale_q,
        k_scale=k_scale if scale_k is None else scale_k,
        v_scale=v_scale if scale_v is None else scale_v,
    )


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)


def trtllm_batch_context_with_kv_cache(
    query: torch.Tensor,
    kv_cache: Cache,
    workspace_buffer: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    max_kv_len: int,
    bmm1_scale: float | torch.Tensor,
    bmm2_scale: float | torch.Tensor,
    batch_size: int,
    cum_seq_lens_q: torch.Tensor,
    cum_seq_lens_kv: torch.Tensor | None = None,
    window_left: int = -1,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | str | None = None,
    o_sf_scale: float | None = None,
    o_sf_vec_size: int | None = None,
    kv_layout: str = "HND",
    enable_pdl: bool | None = None,
    sinks: torch.Tensor | Sequence[torch.Tensor] | None = None,
    kv_cache_sf: Any = None,
    skip_softmax_threshold_scale_factor: float | None = None,
    uses_shared_paged_kv_idx: bool = True,
) -> torch.Tensor:
    """Causal prefill over block_tables [batch, pages] and seq_lens [batch]; the rows of each
    request are those of cum_seq_lens_q [batch + 1]. Scales and sinks as in
    trtllm_batch_decode_with_kv_cache."""
    refuse(o_sf_scale=o_sf_scale, o_sf_vec_size=o_sf_vec_size, kv_cache_sf=kv_cache_sf)
    return block_table_attention(
        query,
        kv_cache,
        workspace_buffer,
        block_tables,
        seq_lens,
        cum_seq_lens_q,
        max_qo_len=0,
        bmm1_scale=bmm1_scale,
        bmm2_scale=bmm2_scale,
        window_left=window_left,
        out=out,
        out_dtype=out_dtype,
        sinks=sinks,
        kv_layout=kv_layout,
    )


__getattr__ = missing(__name__)
