"""qkv: LLM-inference kernels on the CPU and on NVIDIA GPUs, for arrays of any DLPack framework.

The functions and objects are those of the C library (qkv/*.h), with the same names. Arrays of torch, NumPy, CuPy
and others go in as they are; outputs are made by the framework of the inputs, or given (out=).

    qkv.rmsnorm(x, weight)                      norms, RoPE, activations, products, sampling, cache pages
    qkv.attention.Attention(...)                the attention operator: plan() once a step, run() once a layer
    qkv.Context("cuda:1", num_threads=4)        a device; calls without ctx= use the default one of their arrays'

Errors are qkv.Error and its subclasses, with the library's message, which names the argument.
"""

import importlib
from typing import NamedTuple

from qkv import _version

from ._native import (
    CommError,
    CompileError,
    Context,
    DeviceError,
    Error,
    InternalError,
    InvalidError,
    OutOfMemoryError,
    UnsupportedError,
    add_rmsnorm,
    argmax,
    context,
    empty_like,
    gated_activation,
    gemm,
    gemm_quantized,
    kv_append,
    kv_append_slots,
    kv_copy_pages,
    log_probs,
    mask_logits,
    renormalize,
    rmsnorm,
    rope,
    sample,
    top_k,
    verify,
    version,
)

__version__ = _version.version
if __version__ != ".".join(map(str, version())):
    raise ImportError(f"qkv {__version__} found libqkv {'.'.join(map(str, version()))}: reinstall qkv")


class Rope(NamedTuple):
    """Rotary position embedding: qkv_rope_spec of qkv/rope.h.

    rotary_dim: even, 0 = the head dim. interleaved: pairs (2i, 2i + 1), else (i, i + rotary_dim / 2). theta: the
    base. scale: context extension factor. low_freq, high_freq, old_context: the scaling of Llama 3.1.
    """

    rotary_dim: int = 0
    interleaved: bool = False
    theta: float = 10000.0
    scale: float = 1.0
    low_freq: float = 0.0
    high_freq: float = 0.0
    old_context: float = 0.0


class Variant(NamedTuple):
    """An attention variant: a few lines of C that are compiled into the kernels (qkv/variant.h says which).

    name: an identifier, for messages. source: the text. params: of each parameter ("slope", "f32"), ("n", "i32") or,
    for a tensor, ("table", dtype, ndim), in the order of run(args=).
    """

    name: str
    source: str
    params: tuple = ()


_submodules = ("attention", "bench", "flashinfer", "logits_processor", "ops", "transformers")


def __getattr__(name):
    """Submodules are imported when first asked for: import qkv stays short."""
    if name in _submodules:
        return importlib.import_module(f"qkv.{name}")
    raise AttributeError(f"module 'qkv' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_submodules})
