"""Gated activations: of the first half of the last axis, times the second."""

from __future__ import annotations

import torch

import qkv

from ._missing import missing


def _gated(input: torch.Tensor, out: torch.Tensor | None, kind: str) -> torch.Tensor:
    size = input.shape[-1] // 2
    if input.shape[-1] % 2:
        raise ValueError(f"input: expected an even last axis, got {input.shape[-1]}")
    if out is None:
        out = input.new_empty(*input.shape[:-1], size)
    rows = input if input.ndim == 2 else input.reshape(-1, 2 * size)
    target = out if out.ndim == 2 else out.view(-1, size)
    qkv.gated_activation(rows[:, :size], rows[:, size:], kind, out=target)
    return out


def silu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """silu(input[..., :n]) * input[..., n:]; input [..., 2 n], out [..., n]."""
    return _gated(input, out, "silu")


def gelu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """gelu(input[..., :n]) * input[..., n:], with erf."""
    return _gated(input, out, "gelu")


def gelu_tanh_and_mul(
    input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None
) -> torch.Tensor:
    """gelu(input[..., :n]) * input[..., n:], with tanh."""
    return _gated(input, out, "gelu_tanh")


__getattr__ = missing(__name__)
