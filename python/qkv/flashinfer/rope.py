"""Rotary position embedding of q [nnz, num_qo_heads, head_dim] and k [nnz, num_kv_heads, head_dim].

The forms differ in where positions come from (indptr [batch + 1] and offsets [batch]: row t of
request r is at offsets[r] + t - indptr[r]; or pos_ids [nnz]), in the frequencies, and in whether q
and k are changed in place."""

from __future__ import annotations

import torch

import qkv

from ._missing import missing

Pair = tuple[torch.Tensor, torch.Tensor]


def _rope(
    q: torch.Tensor,
    k: torch.Tensor,
    in_place: bool,
    rotary_dim: int | None,
    interleave: bool,
    scale: float,
    theta: float,
    low_freq: float = 0.0,
    high_freq: float = 0.0,
    old_context: float = 0.0,
    **places: torch.Tensor,
) -> Pair:
    """places: indptr and offsets, or positions."""
    return qkv.rope(
        q,
        k,
        **{name: x.to(q.device, torch.int32) for name, x in places.items()},
        rotary_dim=rotary_dim or 0,
        interleaved=interleave,
        theta=theta,
        scale=scale,
        low_freq=low_freq,
        high_freq=high_freq,
        old_context=old_context,
        q_out=q if in_place else None,
        k_out=k if in_place else None,
    )


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Pair:
    """Rotated copies of q and k."""
    return _rope(q, k, False, rotary_dim, interleave, rope_scale, rope_theta, indptr=indptr, offsets=offsets)


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """apply_rope on q and k themselves."""
    _rope(q, k, True, rotary_dim, interleave, rope_scale, rope_theta, indptr=indptr, offsets=offsets)


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Pair:
    """Rotated copies of q and k."""
    return _rope(q, k, False, rotary_dim, interleave, rope_scale, rope_theta, positions=pos_ids)


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """apply_rope_pos_ids on q and k themselves."""
    _rope(q, k, True, rotary_dim, interleave, rope_scale, rope_theta, positions=pos_ids)


def apply_llama31_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Pair:
    """apply_rope with Llama 3.1's frequencies."""
    blend = low_freq_factor, high_freq_factor, old_context_len
    return _rope(q, k, False, rotary_dim, interleave, rope_scale, rope_theta, *blend, indptr=indptr, offsets=offsets)


def apply_llama31_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """apply_llama31_rope on q and k themselves."""
    blend = low_freq_factor, high_freq_factor, old_context_len
    _rope(q, k, True, rotary_dim, interleave, rope_scale, rope_theta, *blend, indptr=indptr, offsets=offsets)


def apply_llama31_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Pair:
    """apply_rope_pos_ids with Llama 3.1's frequencies."""
    blend = low_freq_factor, high_freq_factor, old_context_len
    return _rope(q, k, False, rotary_dim, interleave, rope_scale, rope_theta, *blend, positions=pos_ids)


def apply_llama31_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """apply_llama31_rope_pos_ids on q and k themselves."""
    blend = low_freq_factor, high_freq_factor, old_context_len
    _rope(q, k, True, rotary_dim, interleave, rope_scale, rope_theta, *blend, positions=pos_ids)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """The rotated part of x [nnz, heads, rotary_dim], f32; cos, sin [nnz, 1, rotary_dim / 2]."""
    x = x.float()
    a, b = x.chunk(2, -1) if is_neox else (x[..., ::2], x[..., 1::2])
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """Rotates query [nnz, num_qo_heads * head_size] and key [nnz, num_kv_heads * head_size] in
    place, by the row of cos_sin_cache f32 [positions, rotary_dim] (cosines, then sines) that
    positions [nnz] says. Torch arithmetic: qkv computes its angles, it does not read tables."""
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError(f"cos_sin_cache: expected float32, got {cos_sin_cache.dtype}")
    rotary_dim = cos_sin_cache.shape[-1]
    cos, sin = cos_sin_cache[positions.long()][:, None].chunk(2, -1)
    for x in (query, key):
        rotated = x.view(x.shape[0], -1, head_size)[..., :rotary_dim]
        rotated.copy_(_rotate(rotated, cos, sin, is_neox))


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> Pair:
    """apply_rope_with_cos_sin_cache_inplace on copies."""
    query, key = query.clone(), key.clone()
    apply_rope_with_cos_sin_cache_inplace(positions, query, key, head_size, cos_sin_cache, is_neox)
    return query, key


__getattr__ = missing(__name__)
