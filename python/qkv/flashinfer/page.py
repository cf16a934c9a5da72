"""Helpers of the paged cache."""

from __future__ import annotations

import torch

import qkv

from ._missing import missing
from ._operator import Cache, split_cache


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """i32 [batch] tokens of each request: (pages - 1) * page_size + last_page_len, where 0 of a
    request with pages means a full page; of a request without pages last_page_len itself."""
    pages = kv_indptr.diff()
    last = torch.where((pages > 0) & (kv_last_page_len == 0), page_size, kv_last_page_len)
    return (pages - 1).clamp(min=0) * page_size + last


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """i32 [nnz] each: the request of row t, and its position seq_len - appended + (its index among
    the request's rows). Rows beyond append_indptr[batch] get -1 and 0.

    append_indptr [batch + 1]; seq_lens [batch] with the appended tokens counted."""
    device, batch = append_indptr.device, len(append_indptr) - 1
    rows = torch.arange(nnz, dtype=append_indptr.dtype, device=device)
    request = torch.searchsorted(append_indptr[1:].contiguous(), rows, right=True)
    ends = torch.cat([append_indptr[1:], append_indptr.new_zeros(1)])
    lens = torch.cat([seq_lens.to(device), seq_lens.new_zeros(1, device=device)])
    real = request < batch
    found = (
        torch.where(real, request, -1).to(torch.int32),
        torch.where(real, lens[request] - ends[request] + rows, 0).to(torch.int32),
    )
    given = (batch_indices, positions)
    for there, new in zip(given, found):
        if there is not None:
            there[:nnz].copy_(new)
    return tuple(new if there is None else there for there, new in zip(given, found))


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: Cache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Writes append_key and append_value [nnz, num_kv_heads, head_dim] to the slots of request
    batch_indices[t] at positions[t]; rows of a negative request are skipped. The page table counts
    the new tokens already."""
    k_cache, v_cache = split_cache(paged_kv_cache)
    axis = (1 if kv_layout == "NHD" else 2) + (v_cache is None)
    page_size, device = k_cache.shape[axis], append_key.device
    request = batch_indices.to(device, torch.int64)
    position = positions.to(device, torch.int64)
    first = kv_indptr.to(device, torch.int64)[request.clamp(min=0)]
    skipped = request < 0
    entry = torch.where(skipped, 0, first + position // page_size)
    pages = kv_indices.to(device, torch.int64)
    if len(pages) == 0:
        return
    slots = torch.where(skipped, -1, pages[entry] * page_size + position % page_size)
    qkv.kv_append_slots(k_cache, v_cache, append_key, append_value, slots, kv_layout=kv_layout)


__getattr__ = missing(__name__)
