"""RMS normalisation over the last axis."""

from __future__ import annotations

import torch

import qkv

from ._missing import missing


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, hidden] over the same memory."""
    return x if x.ndim == 2 else x.view(-1, x.shape[-1])


def _rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None, bias: float) -> torch.Tensor:
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    qkv.rmsnorm(rows, weight, eps, bias, out=_rows(out))
    return out


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """input / sqrt(mean(input^2) + eps) * weight; input [..., hidden], weight [hidden]."""
    return _rmsnorm(input, weight, eps, out, 0.0)


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """rmsnorm with 1 + weight."""
    return _rmsnorm(input, weight, eps, out, 1.0)


def fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """In place: residual += input; input = rmsnorm(residual)."""
    rows = _rows(input)
    qkv.add_rmsnorm(rows, _rows(residual), weight, eps, 0.0, out=rows)


def gemma_fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """fused_add_rmsnorm with 1 + weight."""
    rows = _rows(input)
    qkv.add_rmsnorm(rows, _rows(residual), weight, eps, 1.0, out=rows)


__getattr__ = missing(__name__)
