"""Prefill and decode of one step in one call."""

from __future__ import annotations

from typing import Any

import torch

from ._missing import missing, refuse
from ._operator import Cache
from .decode import BatchDecodeWithPagedKVCacheWrapper
from .prefill import BatchPrefillWithPagedKVCacheWrapper, single_prefill_with_kv_cache


class PODWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """A prefill over contiguous keys beside a batch of decodes, which plan is about. They run one
    after the other: an operator's launch fills the GPU by itself."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        jit_args: Any = None,
    ) -> None:
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            use_cuda_graph,
            True,
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
            jit_args=jit_args,
        )

    def run(
        self,
        q_p: torch.Tensor,
        k_p: torch.Tensor,
        v_p: torch.Tensor,
        q_d: torch.Tensor,
        paged_kv_cache_d: Cache,
        custom_mask_p: torch.Tensor | None = None,
        packed_custom_mask_p: torch.Tensor | None = None,
        causal_p: bool = False,
        kv_layout_p: str = "NHD",
        pos_encoding_mode_p: str = "NONE",
        sm_scale_p: float | None = None,
        window_left_p: int = -1,
        rope_scale_p: float | None = None,
        rope_theta_p: float | None = None,
        return_lse_p: bool = False,
        custom_mask_d: torch.Tensor | None = None,
        packed_custom_mask_d: torch.Tensor | None = None,
        causal_d: bool = False,
        kv_layout_d: str | None = None,
        pos_encoding_mode_d: str | None = None,
        sm_scale_d: float | None = None,
        window_left_d: int | None = None,
        rope_scale_d: float | None = None,
        rope_theta_d: float | None = None,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
        *args: Any,
    ) -> tuple[Any, Any]:
        """(out of the prefill, out of the decodes), each with its lse where asked for. A decode's
        one row sees all its keys, causal or not; its options are plan's unless given here."""
        refuse(custom_mask_d=custom_mask_d, packed_custom_mask_d=packed_custom_mask_d)
        prefill = single_prefill_with_kv_cache(
            q_p,
            k_p,
            v_p,
            custom_mask=custom_mask_p,
            packed_custom_mask=packed_custom_mask_p,
            causal=causal_p,
            kv_layout=kv_layout_p,
            pos_encoding_mode=pos_encoding_mode_p,
            sm_scale=sm_scale_p,
            window_left=window_left_p,
            rope_scale=rope_scale_p,
            rope_theta=rope_theta_p,
            return_lse=return_lse_p,
        )
        planned = (
            self._pos_encoding_mode,
            self._window_left,
            self._logits_soft_cap,
            self._sm_scale,
            self._rope_scale,
            self._rope_theta,
        )
        here = (pos_encoding_mode_d, window_left_d, None, sm_scale_d, rope_scale_d, rope_theta_d)
        self._remember(self._causal, *(b if a is None else a for a, b in zip(here, planned)))
        try:
            decode = super().run(
                q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse_d
            )
        finally:
            self._remember(self._causal, *planned)
        return prefill, decode


class BatchPODWithPagedKVCacheWrapper:
    """A batch of prefills beside a batch of decodes, each with its page table."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._decode = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)

    def plan(
        self,
        qo_indptr_p: torch.Tensor,
        kv_indptr_p: torch.Tensor,
        kv_indices_p: torch.Tensor,
        last_page_len_p: torch.Tensor,
        qo_indptr_d: torch.Tensor,
        kv_indptr_d: torch.Tensor,
        kv_indices_d: torch.Tensor,
        last_page_len_d: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        """Takes a step of each, as the prefill wrapper's plan. The prefills' mask is said in
        run."""
        arrays_p = (qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p)
        arrays_d = (qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d)
        self._options = {
            "pos_encoding_mode": pos_encoding_mode,
            "window_left": window_left,
            "logits_soft_cap": logits_soft_cap,
            "sm_scale": sm_scale,
            "rope_scale": rope_scale,
            "rope_theta": rope_theta,
        }
        for wrapper, arrays in ((self._prefill, arrays_p), (self._decode, arrays_d)):
            wrapper.plan(
                *arrays,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
                q_data_type=q_data_type or data_type,
                kv_data_type=kv_data_type or data_type,
                non_blocking=non_blocking,
                **self._options,
            )

    begin_forward = plan

    def run(
        self,
        q_p: torch.Tensor,
        paged_kv_cache_p: Cache,
        q_d: torch.Tensor,
        paged_kv_cache_d: Cache,
        custom_mask_p: torch.Tensor | None = None,
        packed_custom_mask_p: torch.Tensor | None = None,
        causal_p: bool = False,
        *,
        causal_d: bool = False,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> tuple[Any, Any]:
        """(out of the prefills, out of the decodes), with return_lse each with its lse."""
        refuse(custom_mask_p=custom_mask_p, packed_custom_mask_p=packed_custom_mask_p)
        scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        options = {"return_lse": return_lse, **scales, **self._options}
        return (
            self._prefill.forward(q_p, paged_kv_cache_p, causal=causal_p, **options),
            self._decode.forward(q_d, paged_kv_cache_d, causal=causal_d, **options),
        )

    def end_forward(self) -> None:
        """Does nothing."""


__getattr__ = missing(__name__)
