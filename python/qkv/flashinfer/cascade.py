"""Merging of attention states, and attention over keys that requests share.

States are (v [n, heads, dim], s f32 [n, heads]) with s the base-2 log-sum-exp."""

from __future__ import annotations

from typing import Any
from collections.abc import Sequence

import torch

from qkv import attention

from ._missing import missing
from ._operator import Cache, Model, data_types, full_last_page, together
from ._wrapper import Wrapper, fill_buffers
from .decode import BatchDecodeWithPagedKVCacheWrapper
from .prefill import BatchPrefillWithPagedKVCacheWrapper, single_prefill_with_kv_cache_return_lse

State = tuple[torch.Tensor, torch.Tensor]


def merge_state(v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor) -> State:
    """The state over the keys of both: (v, s)."""
    return attention.merge([v_a, v_b], [s_a.float(), s_b.float()], base_2=True, lse=True)


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """Merges the other state into (v, s); mask bool [n]: only where it is set."""
    if mask is not None:
        # A state of -inf counts for nothing.
        s_other = s_other.masked_fill(~mask.bool()[:, None], -torch.inf)
    attention.merge([v, v_other], [s, s_other.float()], base_2=True, o=v, lse=s)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> State:
    """The state over all of v [n, states, heads, dim], s [n, states, heads]."""
    if v.shape[1] == 0:
        return v.new_zeros(v.shape[0], *v.shape[2:]), s.new_full(s.shape[::2], -torch.inf)
    s = s.float()
    found = [(each, at) for each, at in zip(v.unbind(1), s.unbind(1))]
    while True:
        # As many as the operator takes at a time.
        values, logs = zip(*found[:64])
        merged = attention.merge(list(values), list(logs), base_2=True, lse=True)
        found = [merged, *found[64:]]
        if len(found) == 1:
            return merged


class MultiLevelCascadeAttentionWrapper(Wrapper):
    """Attention over the pages of groups of requests, level by level, and last each request's own.

    One operator over all levels: keys that a group shares are read once for it. Level l's
    qo_indptr cuts the rows into groups, each of which holds whole groups of level l + 1. Positions
    count through the levels, so that causal, windows and RoPE see one sequence."""

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Sequence[torch.Tensor] | None = None,
        paged_kv_indptr_buf_arr: Sequence[torch.Tensor] | None = None,
        paged_kv_indices_buf_arr: Sequence[torch.Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: Sequence[torch.Tensor] | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph)
        self._num_levels = num_levels
        self._buffers = (
            qo_indptr_buf_arr,
            paged_kv_indptr_buf_arr,
            paged_kv_indices_buf_arr,
            paged_kv_last_page_len_buf_arr,
        )
        if use_cuda_graph and any(b is None or len(b) != num_levels for b in self._buffers):
            raise ValueError(f"*_buf_arr: expected {num_levels} buffers each with use_cuda_graph")

    def plan(
        self,
        qo_indptr_arr: Sequence[torch.Tensor],
        paged_kv_indptr_arr: Sequence[torch.Tensor],
        paged_kv_indices_arr: Sequence[torch.Tensor],
        paged_kv_last_page_len: Sequence[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
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
    ) -> None:
        """Takes a step: for each level what the paged prefill wrapper takes, shared levels
        first."""
        given = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        for name, arrays in zip(("qo_indptr", "kv_indptr", "kv_indices", "last_page_len"), given):
            if len(arrays) != self._num_levels:
                raise ValueError(f"{name}: expected {self._num_levels} arrays, one a level, got {len(arrays)}")
        if self.is_cuda_graph_enabled:
            placed = list(zip(*self._buffers))
            for buffers, level in zip(placed, zip(*given)):
                fill_buffers(buffers, level, page_size, non_blocking=False)
        else:
            flat = together(self.device, *(array for level in zip(*given) for array in level))
            placed = [flat[at : at + 4] for at in range(0, len(flat), 4)]
            for level in placed:
                level[3] = full_last_page(level[3], page_size)
        self._remember(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        q_type, kv_type, o_type = data_types(q_data_type, kv_data_type, None)
        names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
        levels = [dict(zip(names, level)) for level in placed]
        self._plan(
            Model(
                num_qo_heads,
                num_kv_heads,
                head_dim,
                head_dim,
                page_size,
                self._kv_layout,
                q_type,
                kv_type,
                o_type,
                max_levels=self._num_levels,
            ),
            {
                "max_requests": max(len(level["kv_last_page_len"]) for level in levels),
                "max_tokens": int(qo_indptr_arr[-1][-1]),
                "max_pages": sum(len(level["kv_indices"]) for level in levels),
            },
            {"levels": levels},
        )

    begin_forward = plan

    def run(self, q: torch.Tensor, paged_kv_cache: Cache) -> torch.Tensor:
        """out [rows, num_qo_heads, head_dim]."""
        return self._run(q, paged_kv_cache)

    forward = run


class _SharedPrefix:
    """A prefix of all requests, given as tensors, before each request's own pages."""

    def end_forward(self) -> None:
        """Does nothing."""

    def reset_workspace_buffer(self, *args: Any, **kwargs: Any) -> None:
        """Accepted: nothing here lies in a caller's workspace."""

    def _merged(
        self, q: torch.Tensor, k_shared: torch.Tensor, v_shared: torch.Tensor, own: State, sm_scale: float | None
    ) -> torch.Tensor:
        shared = single_prefill_with_kv_cache_return_lse(
            q, k_shared, v_shared, kv_layout=self._kv_layout, sm_scale=sm_scale
        )
        return merge_state(*shared, *own)[0]


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Decode over a shared prefix and each request's own pages. The cascade wrapper is the newer
    form."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._kv_layout = kv_layout
        self._own = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)

    def begin_forward(
        self,
        unique_kv_indptr: torch.Tensor,
        unique_kv_indices: torch.Tensor,
        unique_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: torch.dtype | str = "float16",
    ) -> None:
        """Takes a step, as the decode wrapper's plan."""
        self._own.plan(
            unique_kv_indptr,
            unique_kv_indices,
            unique_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            q_data_type=data_type,
        )

    plan = begin_forward

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: Cache,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """q [batch, num_qo_heads, head_dim]; k_shared, v_shared [prefix, num_kv_heads, head_dim]
        (by kv_layout)."""
        own = self._own.forward(q, unique_kv_cache, sm_scale=sm_scale, return_lse=True)
        return self._merged(q, k_shared, v_shared, own, sm_scale)

    run = forward


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Prefill over a shared prefix and each request's own pages."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._kv_layout = kv_layout
        self._own = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: torch.dtype | str = "float16",
    ) -> None:
        """Takes a step, as the prefill wrapper's plan."""
        self._own.plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            q_data_type=data_type,
        )

    plan = begin_forward

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: Cache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """q [rows, num_qo_heads, head_dim]; the shared keys are before all rows, causal or not."""
        own = self._own.forward_return_lse(q, unique_kv_cache, causal=causal, sm_scale=sm_scale)
        return self._merged(q, k_shared, v_shared, own, sm_scale)

    run = forward


__getattr__ = missing(__name__)
