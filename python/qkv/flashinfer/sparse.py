"""Attention to listed blocks of keys."""

from __future__ import annotations

import math
from typing import Any

import torch

from ._missing import missing, refuse
from ._operator import Model, data_types
from ._wrapper import Wrapper
from .quantization import segment_packbits


class _BlockSparse(Wrapper):
    """One request of M rows and N keys. Block lists are checked, so they are read on the host."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str) -> None:
        super().__init__(float_workspace_buffer, kv_layout, False)

    def _lists(self, indptr: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The block lists as Attention.plan takes them: offsets on the host, what kernels read
        where they can, indices both."""
        lists = {"bsr_indptr": indptr.to("cpu", torch.int32), "bsr_indices": indices.to("cpu", torch.int32)}
        if self.device.type != "cpu":
            lists["bsr_indices"] = lists["bsr_indices"].pin_memory()
        if mask is not None:
            lists["bsr_mask"] = mask.to(self.device)
        return lists

    def _plan_blocks(
        self, lists: dict[str, torch.Tensor], rows: int, keys: int, block: tuple[int, int], model: Model
    ) -> None:
        self._plan(
            model,
            {"max_requests": 1, "max_tokens": rows, "max_pages": 0, "max_row_blocks": lists["bsr_indptr"].numel()},
            {
                "qo_indptr": torch.tensor([0, rows], dtype=torch.int32),
                "kv_indptr": torch.tensor([0, keys], dtype=torch.int32),
                "bsr_rows": block[0],
                "bsr_cols": block[1],
                **lists,
            },
        )


class BlockSparseAttentionWrapper(_BlockSparse):
    """Attention under a mask of M x N elements in blocks of R x C, of which some are listed."""

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer, "NHD")

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: torch.Tensor | None = None,
        packed_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        non_blocking: bool = True,
        block_mask: torch.Tensor | None = None,
    ) -> None:
        """indptr [M / R + 1], indices [blocks]: the column blocks of each row block, in any order.
        mask bool [blocks, R, C]: which elements of a listed block; packed_mask the same as bits,
        lowest of a byte first, of each row block [R, listed * C] from a byte of its own on. causal
        is that of the whole M x N matrix, aligned to its lower right."""
        refuse(block_mask=block_mask)
        if N % C:
            raise ValueError(f"N: expected a multiple of C = {C}, got {N}")
        indptr, indices = indptr.cpu().long(), indices.cpu().long()
        lens = indptr.diff()
        row_block = torch.repeat_interleave(torch.arange(len(lens)), lens)
        order = (row_block * (N // C) + indices).argsort()
        bits = None
        if mask is None and packed_mask is not None:
            mask = _unpacked(packed_mask, lens.tolist(), R, C)
        if mask is not None:
            flat = mask.reshape(-1, R * C)[order.to(mask.device)].reshape(-1)
            ends = torch.arange(len(indices) + 1) * (R * C)
            bits = segment_packbits(flat, ends, "little")[0].view(-1, (R * C + 7) // 8)
        self._remember(causal, pos_encoding_mode, -1, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        q_type, kv_type, o_type = data_types(q_data_type, kv_data_type, o_data_type)
        model = Model(num_qo_heads, num_kv_heads, head_dim, head_dim, 0, "NHD", q_type, kv_type, o_type)
        self._plan_blocks(self._lists(indptr[None], indices[order], bits), M, N, (R, C), model)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale_q: torch.Tensor | None = None,
        scale_k: torch.Tensor | None = None,
        scale_v: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """q [M, num_qo_heads, head_dim], k and v [N, num_kv_heads, head_dim]: out [M, num_qo_heads,
        head_dim], or (out, lse [M, num_qo_heads])."""
        return self._run(
            q, (k, v), out=out, lse=lse, return_lse=return_lse, q_scale=scale_q, k_scale=scale_k, v_scale=scale_v
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale_q: torch.Tensor | None = None,
        scale_k: torch.Tensor | None = None,
        scale_v: torch.Tensor | None = None,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """run with options that replace those of plan."""
        self._remember(self._causal, pos_encoding_mode, -1, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, k, v, scale_q, scale_k, scale_v)


def _unpacked(packed: torch.Tensor, listed: list[int], R: int, C: int) -> torch.Tensor:
    """bool [blocks, R, C] of the bits of each row block's [R, listed * C]."""
    bits = (packed.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    blocks, at = [], 0
    for n in listed:
        row_block = bits[at : at + (R * n * C + 7) // 8].reshape(-1)[: R * n * C]
        blocks.append(row_block.reshape(R, n, C).transpose(0, 1))
        at += (R * n * C + 7) // 8
    return torch.cat(blocks).bool()


class VariableBlockSparseAttentionWrapper(_BlockSparse):
    """Attention under a map of blocks of varying sizes, of each KV head."""

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer, "HND")

    def plan(
        self,
        block_mask_map: torch.Tensor,
        block_row_sz: torch.Tensor,
        block_col_sz: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
    ) -> None:
        """block_mask_map bool [num_kv_heads, MB, NB]; block_row_sz [num_kv_heads, MB] and
        block_col_sz [num_kv_heads, NB] with the same sums for all heads. The operator's blocks are
        of one size: the largest that divides all of them."""
        listed = block_mask_map.bool().cpu()
        row_sz, col_sz = block_row_sz.cpu().long(), block_col_sz.cpu().long()
        rows, keys = set(row_sz.sum(-1).tolist()), set(col_sz.sum(-1).tolist())
        if len(rows) != 1 or len(keys) != 1:
            raise ValueError(
                f"block_row_sz, block_col_sz: expected the same sum for all heads, got {sorted(rows)}, {sorted(keys)}"
            )
        R = math.gcd(*row_sz.flatten().tolist()) or 1
        C = math.gcd(*col_sz.flatten().tolist()) or 1
        indptr, indices, before = [], [], 0
        for head in range(num_kv_heads):
            fine = listed[head].repeat_interleave(row_sz[head] // R, 0)
            fine = fine.repeat_interleave(col_sz[head] // C, 1)
            ends = torch.zeros(len(fine) + 1, dtype=torch.int64)
            torch.cumsum(fine.sum(-1), 0, out=ends[1:])
            indptr.append(ends + before)
            indices.append(fine.nonzero()[:, 1])
            before += len(indices[-1])
        self._remember(causal, pos_encoding_mode, -1, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        q_type, kv_type, o_type = data_types(q_data_type, kv_data_type, None)
        self._plan_blocks(
            self._lists(torch.stack(indptr), torch.cat(indices), None),
            rows.pop(),
            keys.pop(),
            (R, C),
            Model(num_qo_heads, num_kv_heads, head_dim, head_dim, 0, "HND", q_type, kv_type, o_type),
        )

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """q [num_qo_heads, M, head_dim], k and v [num_kv_heads, N, head_dim]: out [num_qo_heads, M,
        head_dim], or (out, lse [num_qo_heads, M])."""
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if return_lse and lse is None:
            lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self._run(
            q.transpose(0, 1),
            (k, v),
            out=out.transpose(0, 1),
            lse=lse.transpose(0, 1) if return_lse else None,
            return_lse=return_lse,
        )
        return (out, lse) if return_lse else out

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.run(q, k, v)


__getattr__ = missing(__name__)
