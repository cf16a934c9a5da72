"""The functions of qkv as PyTorch operators, for torch.compile and CUDA graphs.

Importing this module registers ``torch.ops.qkv.*``: each operator with its schema, what it mutates, and
a fake implementation, so that ``torch.compile(fullgraph=True)`` traces over it without a graph break. The
names of this module are those operators::

    import qkv.ops as ops

    layer = ops.handle(attention)              # once, outside of the compiled region

    @torch.compile(fullgraph=True)
    def block(x, ...):
        h = ops.rmsnorm(x, norm_weight)
        q, k = ops.rope(q, k, positions=positions)
        ops.kv_append_slots(k_cache, v_cache, k, v, slots)
        o = ops.attention_run(layer, q, k_cache, v_cache)

    attention.plan(...)                        # once per step, outside of it
    block(x, ...)

Arguments and shapes are those of the functions of the same names in ``qkv``. Those take arrays of any
framework and cost some 3 us less a call: outside of torch.compile they are the better choice. Here every
array and every scale is a torch tensor, and every output is new but the caches and the residual, which are
written in place. None of the operators has a gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

import qkv
import qkv.attention

__all__ = [
    "add_rmsnorm",
    "argmax",
    "attention_run",
    "attention_run_lse",
    "gated_activation",
    "gemm",
    "handle",
    "kv_append",
    "kv_append_slots",
    "log_probs",
    "mask_logits",
    "merge",
    "release",
    "renormalize",
    "rmsnorm",
    "rope",
    "sample",
    "sample_valid",
    "top_k",
    "verify",
]

# Library.define and impl rather than torch.library.custom_op, which wraps each dispatch key in Python:
# rmsnorm of [4, 64] takes 1.9 us called directly, 4.8 as an operator of this library and 13 as a custom
# one (8 under inference_mode), on an AMD EPYC with torch 2.15.
_library = torch.library.Library("qkv", "DEF")


def _define(
    schema: str, implementation: Callable, fake: Callable, tags: tuple = ()
) -> torch._ops.OpOverload:
    """One operator; the overload itself is returned, since looking it up by name costs too."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"qkv::{name}", fake, lib=_library)
    return getattr(torch.ops.qkv, name).default


def _nothing(*args, **kwargs) -> None:
    """Of an operator that only writes in place."""


# --- Norms, activation, product, sampling


def _like_first(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return x.new_empty(x.shape)


def _product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[0]))


def _tokens(logits: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.int32)


rmsnorm = _define(
    "rmsnorm(Tensor x, Tensor weight, float eps=1e-6, float weight_bias=0.0) -> Tensor",
    qkv.rmsnorm,
    _like_first,
)
add_rmsnorm = _define(
    "add_rmsnorm(Tensor x, Tensor(a!) residual, Tensor weight, float eps=1e-6, "
    "float weight_bias=0.0) -> Tensor",
    qkv.add_rmsnorm,
    _like_first,
)
gated_activation = _define(
    'gated_activation(Tensor gate, Tensor up, str kind="silu") -> Tensor',
    qkv.gated_activation,
    _like_first,
)
gemm = _define("gemm(Tensor x, Tensor w) -> Tensor", qkv.gemm, _product)
argmax = _define("argmax(Tensor logits) -> Tensor", qkv.argmax, _tokens)


# A value is an array, of one entry for all rows or of one a row; of one it may be on the host.
_ROWS = (
    "Tensor? temperature=None, Tensor? top_k=None, Tensor? top_n_sigma=None, Tensor? repetition=None, "
    "Tensor? frequency=None, Tensor? presence=None, Tensor? counts=None, Tensor? prompt=None, "
    "Tensor? bias=None, Tensor? bitmask=None, Tensor? indices=None"
)
_PROBS = (
    "Tensor? top_p=None, Tensor? min_p=None, Tensor? typical_p=None, str kind='logits', "
    "str order='top_k_first'"
)


def _requests(rows, indices=None):
    return (rows if indices is None else indices).shape[0]


def _sample(rows, seed, offset=None, **options):
    return qkv.sample(rows, seed=seed, offset=offset, **options)


def _sample_valid(rows, seed, offset=None, **options):
    return qkv.sample(rows, seed=seed, offset=offset, valid=True, **options)


def _sample_fake(rows, seed, offset=None, *, indices=None, **options):
    return rows.new_empty((_requests(rows, indices),), dtype=torch.int32)


def _sample_valid_fake(rows, *args, **options):
    tokens = _sample_fake(rows, *args, **options)
    return tokens, tokens.new_empty(tokens.shape, dtype=torch.bool)


def _rows_fake(rows, *, indices=None, **options):
    return rows.new_empty((_requests(rows, indices), rows.shape[1]))


def _top_k(rows, k, sorted=True):
    return qkv.top_k(rows, k, sorted=sorted)


def _top_k_fake(rows, k, sorted=True):
    shape = rows.shape[0], k
    return rows.new_empty(shape), rows.new_empty(shape, dtype=torch.int32)


def _log_probs(logits, tokens):
    return qkv.log_probs(logits, tokens, ranks=True)


def _log_probs_fake(logits, tokens):
    return (
        logits.new_empty(tokens.shape, dtype=torch.float32),
        logits.new_empty(tokens.shape, dtype=torch.int32),
    )


def _verify(target, draft_tokens, draft=None, *, seed, offset=None, parents=None):
    return qkv.verify(target, draft_tokens, draft, seed=seed, offset=offset, parents=parents)


def _verify_fake(target, draft_tokens, draft=None, **options):
    batch, nodes = draft_tokens.shape
    shapes = (batch, nodes + 1), (batch,), (batch, nodes + 1)
    return tuple(target.new_empty(shape, dtype=torch.int32) for shape in shapes)


_SAMPLE = f"(Tensor rows, Tensor seed, Tensor? offset=None, *, {_ROWS}, {_PROBS}) -> "
sample = _define(f"sample{_SAMPLE}Tensor", _sample, _sample_fake)
sample_valid = _define(f"sample_valid{_SAMPLE}(Tensor, Tensor)", _sample_valid, _sample_valid_fake)
renormalize = _define(
    f"renormalize(Tensor rows, *, {_ROWS}, {_PROBS}) -> Tensor", qkv.renormalize, _rows_fake
)
mask_logits = _define(f"mask_logits(Tensor rows, *, {_ROWS}) -> Tensor", qkv.mask_logits, _rows_fake)
top_k = _define("top_k(Tensor rows, int k, bool sorted=True) -> (Tensor, Tensor)", _top_k, _top_k_fake)
log_probs = _define(
    "log_probs(Tensor logits, Tensor tokens) -> (Tensor, Tensor)", _log_probs, _log_probs_fake
)
verify = _define(
    "verify(Tensor target, Tensor draft_tokens, Tensor? draft=None, *, Tensor seed, "
    "Tensor? offset=None, Tensor? parents=None) -> (Tensor, Tensor, Tensor)",
    _verify,
    _verify_fake,
)


# --- RoPE


def _rope(q, k=None, **options):
    q_out, k_out = qkv.rope(q, k, **options)
    return q_out, q.new_empty(0) if k_out is None else k_out


def _rope_fake(q, k=None, **options):
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


# A schema cannot return an optional tensor: without k the second output has no elements.
rope = _define(
    "rope(Tensor q, Tensor? k=None, *, Tensor? positions=None, Tensor? indptr=None, "
    "Tensor? offsets=None, int rotary_dim=0, bool interleaved=False, float theta=10000.0, "
    "float scale=1.0, float low_freq=0.0, float high_freq=0.0, float old_context=0.0) "
    "-> (Tensor, Tensor)",
    _rope,
    _rope_fake,
)


# --- KV cache


def _kv_append(k_cache, v_cache, k, v, **options):
    qkv.kv_append(k_cache, v_cache, k, v, **options)


def _kv_append_slots(k_cache, v_cache, k, v, slot_mapping, **options):
    qkv.kv_append_slots(k_cache, v_cache, k, v, slot_mapping, **options)


kv_append = _define(
    "kv_append(Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor k, Tensor v, *, Tensor qo_indptr, "
    "Tensor? kv_indptr=None, Tensor? kv_indices=None, Tensor? kv_last_page_len=None, "
    "Tensor? block_table=None, Tensor? kv_lens=None, str kv_layout='NHD', Tensor? positions=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    _kv_append,
    _nothing,
)
kv_append_slots = _define(
    "kv_append_slots(Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor k, Tensor v, "
    "Tensor slot_mapping, *, str kv_layout='NHD', Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    _kv_append_slots,
    _nothing,
)


# --- Attention

# Numbers count from 0, so that a process which makes its operators in the same order finds what
# another one has compiled. The second table holds no operator that the first does not keep alive.
_handles: dict[int, qkv.attention.Attention] = {}
_number_of: dict[int, int] = {}
_counter = itertools.count()


def handle(attention: qkv.attention.Attention) -> int:
    """The integer that stands for an operator in a compiled region; the same for the same operator.

    The operator is kept alive until ``release(handle)``: graphs that were captured use its memory.
    """
    number = _number_of.get(id(attention))
    if number is None:
        number = _number_of[id(attention)] = next(_counter)
        _handles[number] = attention
    return number


def release(number: int) -> None:
    """Forget a handle. Nothing compiled or captured with it may run afterwards."""
    del _number_of[id(_lookup(number))]
    del _handles[number]


def _lookup(number: int) -> qkv.attention.Attention:
    try:
        return _handles[number]
    except KeyError:
        raise ValueError(
            f"handle: expected what qkv.ops.handle gave and release has not taken, got {number}"
        ) from None


def _attention_run(number, q, k, v=None, *, dtype=None, **options):
    o = _lookup(number).run(q, k, v, **options)
    _expect(o, dtype or q.dtype)
    return o


def _attention_run_lse(number, q, k, v=None, *, dtype=None, **options):
    o, lse = _lookup(number).run(q, k, v, lse=True, **options)
    _expect(o, dtype or q.dtype)
    return o, lse


def _expect(o: torch.Tensor, dtype: torch.dtype) -> None:
    """What was traced is what comes."""
    if o.dtype != dtype:
        raise ValueError(f"dtype: expected {o.dtype}, the operator's dtype_o, got {dtype}")


def _attention_fake(number, q, k, v=None, *, dtype=None, **options):
    dim = (k if v is None else v).shape[-1]
    return q.new_empty((q.shape[0], q.shape[1], dim), dtype=dtype or q.dtype)


def _attention_lse_fake(number, q, *args, **options):
    return _attention_fake(number, q, *args, **options), q.new_empty(q.shape[:2], dtype=torch.float32)


# dtype is that of the output, dtype_o of the operator; None is that of q.
_RUN = (
    "(int handle, Tensor q, Tensor k, Tensor? v=None, *, ScalarType? dtype=None, "
    "float sm_scale=0.0, float logits_soft_cap=0.0, int[]? window=None, Tensor? q_scale=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? o_scale=None, Tensor? sink=None, "
    "Tensor? alibi_slopes=None) -> "
)
attention_run = _define(f"attention_run{_RUN}Tensor", _attention_run, _attention_fake)
attention_run_lse = _define(
    f"attention_run_lse{_RUN}(Tensor, Tensor)", _attention_run_lse, _attention_lse_fake
)


def _merge(o_states, lse_states, base_2=False):
    return qkv.attention.merge(o_states, lse_states, base_2=base_2, lse=True)


def _merge_fake(o_states, lse_states, base_2=False):
    return o_states[0].new_empty(o_states[0].shape), lse_states[0].new_empty(lse_states[0].shape)


merge = _define(
    "merge(Tensor[] o_states, Tensor[] lse_states, bool base_2=False) -> (Tensor, Tensor)",
    _merge,
    _merge_fake,
)
