"""Enums and small helpers that engines import from flashinfer.utils."""

from __future__ import annotations

import enum
import math
from typing import Any
from collections.abc import Callable

import torch

from ._missing import missing


class PosEncodingMode(enum.Enum):
    NONE = 0
    ROPE_LLAMA = 1
    ALIBI = 2


class MaskMode(enum.Enum):
    NON_CAUSAL = 0
    CAUSAL = 1
    CUSTOM = 2
    MULTIITEMSCORING = 3


class TensorLayout(enum.Enum):
    NHD = 0
    HND = 1


class FP4Tensor:
    """Engines import the class; no operator here writes fp4."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("flashinfer.utils.FP4Tensor: not offered by qkv.flashinfer")


def canonicalize_torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """torch.float16 for "float16" and for itself."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise TypeError(f"dtype: expected a torch dtype or its name, got {dtype!r}")
    return found


def is_float8(x: torch.Tensor) -> bool:
    return x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def next_positive_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x, and at least 1."""
    return 1 if x < 1 else 1 << (x - 1).bit_length()


def ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def round_up(x: int, y: int) -> int:
    return -(-x // y) * y


def get_compute_capability(device: torch.device) -> tuple[int, int]:
    """(9, 0) for an H100."""
    if device.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {device}")
    return torch.cuda.get_device_capability(device)


def is_sm90a_supported(device: torch.device) -> bool:
    return device.type == "cuda" and get_compute_capability(device)[0] == 9


def is_sm100a_supported(device: torch.device) -> bool:
    return device.type == "cuda" and get_compute_capability(device)[0] == 10


def device_support_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and get_compute_capability(device)[0] >= 9


def get_device_sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_constants: dict[tuple, torch.Tensor] = {}


def constant(key: tuple, device: torch.device, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """make(), kept by (key, device). While a graph is captured nothing is kept: what is made then
    has no content before the first replay."""
    found = _constants.get((key, device))
    if found is None:
        found = make()
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _constants[key, device] = found
    return found


def steps(count: int, step: int, device: torch.device) -> torch.Tensor:
    """i32 [count + 1]: 0, step, ..., count * step; not to be written to."""

    def make() -> torch.Tensor:
        return torch.arange(count + 1, dtype=torch.int32, device=device) * step

    return constant(("steps", count, step), device, make)


def _get_range_buf(seq_len: int, device: torch.device | str) -> torch.Tensor:
    """i32 [seq_len]: 0, 1, ..."""
    return steps(seq_len - 1, 1, torch.device(device))


def alibi_slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    """f32 [num_heads]: with n the largest power of two <= num_heads, 2^(-8 (h + 1) / n) for the
    first n heads, then 2^(-4 (2 (h - n) + 1) / n). Source: Press et al. 2022, arXiv:2108.12409."""

    def make() -> torch.Tensor:
        n = 1 << int(math.log2(num_heads))
        slopes = [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]
        slopes += [2.0 ** (-4.0 * (2 * (h - n) + 1) / n) for h in range(n, num_heads)]
        return torch.tensor(slopes, dtype=torch.float32, device=device)

    return constant(("alibi", num_heads), device, make)


__getattr__ = missing(__name__)
