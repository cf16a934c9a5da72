"""Packing of booleans into bits."""

from __future__ import annotations

import torch

from ._missing import missing


def _pack(bits: torch.Tensor, bitorder: str) -> torch.Tensor:
    """Of bits whose number is a multiple of 8."""
    if bitorder not in ("big", "little"):
        raise ValueError(f"bitorder: expected big or little, got {bitorder!r}")
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    if bitorder == "big":
        places = 7 - places
    return (bits.view(-1, 8).to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """u8 [ceil(n / 8)] of bool x [n]; bit 0 of a byte is its highest ("big") or lowest
    ("little")."""
    return _pack(torch.nn.functional.pad(x.bool().reshape(-1), (0, -x.numel() % 8)), bitorder)


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> tuple[torch.Tensor, torch.Tensor]:
    """Each segment x[indptr[i] : indptr[i + 1]] from a byte of its own on: (u8 [bytes],
    offsets [segments + 1] in bytes)."""
    bit_indptr = indptr.to(x.device, torch.int64)
    lens = bit_indptr.diff()
    byte_indptr = torch.zeros_like(bit_indptr)
    torch.cumsum((lens + 7) // 8, 0, out=byte_indptr[1:])
    bits = x.new_zeros(8 * int(byte_indptr[-1]), dtype=torch.bool)
    count = int(bit_indptr[-1])
    shift = torch.repeat_interleave(8 * byte_indptr[:-1] - bit_indptr[:-1], lens, output_size=count)
    bits[torch.arange(count, device=x.device) + shift] = x[:count].bool()
    return _pack(bits, bitorder), byte_indptr.to(indptr.device, indptr.dtype)


__getattr__ = missing(__name__)
