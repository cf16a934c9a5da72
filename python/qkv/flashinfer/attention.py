"""BatchAttention in FlashInfer's form and in qkv's, and attention with sinks."""

from __future__ import annotations

from typing import Any

import torch

import qkv

from ._missing import missing, refuse
from ._operator import Cache, Model, data_types
from ._wrapper import Wrapper
from .prefill import BatchPrefillWithPagedKVCacheWrapper


class BatchAttention(Wrapper):
    """Prefill and decode of one step in one operator.

    plan takes one of two forms: (qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_qo_heads, ...),
    or (qo_offsets, kv_lens, kv_block_table, num_qo_heads, ...), which is that of
    qkv.attention.BatchAttention and is passed on to it."""

    def __init__(
        self, kv_layout: str = "NHD", device: torch.device | str | None = None, *, backend: str = "auto"
    ) -> None:
        """device: the GPU if there is one."""
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__(torch.empty(0, dtype=torch.uint8, device=device), kv_layout, False)
        self._backend = backend
        self._by_offsets: Any = None

    def plan(self, *args: Any, **kwargs: Any) -> None:
        names = "qo_offsets" in kwargs or "kv_block_table" in kwargs
        if names or len(args) > 3 and isinstance(args[3], int):
            if self._by_offsets is None:
                self._by_offsets = qkv.attention.BatchAttention(
                    self._backend, kv_layout=self._kv_layout, lse_base_2=True
                )
            self._by_offsets.plan(*args, **kwargs)
            return
        self._by_offsets = None
        self._plan_indptr(*args, **kwargs)

    def _plan_indptr(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str = torch.bfloat16,
        kv_data_type: torch.dtype | str = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """qo_indptr [batch + 1] in rows, kv_indptr [batch + 1] in pages, kv_len_arr [batch] in
        tokens. The lengths are read on the host, which waits for the stream if they are on the
        GPU; of a request's pages those beyond its length are left out."""
        refuse(use_profiler=use_profiler)
        rows, first, lens = (x.cpu().long() for x in (qo_indptr, kv_indptr, kv_len_arr))
        used = (lens + page_size - 1) // page_size
        indptr = torch.zeros_like(first)
        torch.cumsum(used, 0, out=indptr[1:])
        if not torch.equal(indptr, first):
            if bool((used > first.diff()).any()):
                raise ValueError("kv_len_arr: expected no more tokens than a request's pages hold")
            shift = torch.repeat_interleave(first[:-1] - indptr[:-1], used)
            entries = torch.arange(int(indptr[-1])) + shift
            kv_indices = kv_indices[entries.to(kv_indices.device)]
        last = torch.where(lens > 0, (lens - 1) % page_size + 1, 0)
        # Indices that are on the GPU stay there, and the lengths go to them.
        where = kv_indices.device
        self._remember(causal, "NONE", -1, logits_soft_cap, sm_scale, None, None)
        q_type, kv_type, o_type = data_types(q_data_type, kv_data_type, None)
        self._plan(
            Model(
                num_qo_heads,
                num_kv_heads,
                head_dim_qk,
                head_dim_vo,
                page_size,
                self._kv_layout,
                q_type,
                kv_type,
                o_type,
            ),
            {"max_requests": len(lens), "max_tokens": int(rows[-1]), "max_pages": len(kv_indices)},
            {
                "qo_indptr": rows.to(where, torch.int32),
                "kv_indptr": indptr.to(where, torch.int32),
                "kv_indices": kv_indices.to(torch.int32),
                "kv_last_page_len": last.to(where, torch.int32),
            },
        )

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        kv_cache: Cache,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: torch.Tensor | None = None,
        kv_cache_sf: Any = None,
        **options: Any,
    ) -> Any:
        """(out [rows, num_qo_heads, head_dim_vo], lse f32 [rows, num_qo_heads] in base 2)."""
        if self._by_offsets is not None:
            return self._by_offsets.run(q, kv_cache, **options)
        refuse(profiler_buffer=profiler_buffer, kv_cache_sf=kv_cache_sf, **options)
        if logits_soft_cap and logits_soft_cap != self._logits_soft_cap:
            self._remember(self._causal, "NONE", -1, logits_soft_cap, self._sm_scale, None, None)
        return self._run(q, kv_cache, out=out, lse=lse, return_lse=True, k_scale=k_scale, v_scale=v_scale)


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """The paged prefill wrapper with a sink: one more logit for each query head."""

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
        q_data_type: torch.dtype | str | None = None,
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            qo_indptr_buf,
            paged_kv_indptr_buf,
            paged_kv_indices_buf,
            paged_kv_last_page_len_buf,
            custom_mask_buf,
            mask_indptr_buf,
            backend,
        )

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: Cache,
        sinks: torch.Tensor | None = None,
        sm_scale: float | None = None,
        **options: Any,
    ) -> Any:
        """As the paged prefill wrapper's; sinks f32 [num_qo_heads] in natural units."""
        if sm_scale is not None:
            self._sm_scale = sm_scale
        return super().run(q, paged_kv_cache, sinks=sinks, **options)


__getattr__ = missing(__name__)
