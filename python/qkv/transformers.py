"""``attn_implementation="qkv"`` for Hugging Face Transformers.

    import qkv.transformers                                   # registers the name

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="qkv")
    model.set_attn_implementation("qkv")                      # or later

Prefill and decode over Transformers' caches, with padding, grouped heads, sliding windows, soft caps and
sinks, on the CPU and on GPUs, for inference: gradients, dropout and attention weights are not offered. A
layer's cache, [batch, heads, tokens, dim], is read in place. Continuous batching (``generate_batch``) takes
the same name, over the keys and values that its paged cache gathers. Made for Transformers 5.24.

How a step is described: Transformers asks once a step for a mask and hands it to each layer. Where the
pattern is one that the operator knows (causal or not, a window or not, padding only at the ends), the answer
is not a mask but *bounds*: i32 [batch, 1 if causal else 2, 1 or 2 + window, 3], of which each request has
(its first key, the end of its keys, the position of its first row among the keys). The two inner axes have
stride 0 and are there for their lengths, which can be read without waiting for a GPU. Any other pattern is a
boolean mask, as for SDPA, and becomes the bits of a custom mask. The operator is planned when the first
layer shows it something new.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import qkv.attention
from qkv.ops import _define

__all__ = ["attention_forward", "attention_mask", "register"]

NAME = "qkv"


def register() -> None:
    """Make "qkv" known to Transformers. Importing this module does it."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < (5, 24):
        raise ImportError(f"transformers: expected 5.24 or newer, got {transformers.__version__}")
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    _admit_to_continuous_batching()


def _admit_to_continuous_batching() -> None:
    """generate_batch accepts the implementations it lists, and there is no way to add to its list.

    What it checks for holds here: no mask is needed, and packed requests are understood.
    """
    from transformers.generation.continuous_batching import ContinuousBatchingManager as Manager

    check = Manager.switch_to_cb_friendly_attn
    if hasattr(check, "admits_qkv"):
        return

    @functools.wraps(check)
    def switch(self, model, *args, **kwargs):
        if model.config._attn_implementation != NAME:
            check(self, model, *args, **kwargs)

    switch.admits_qkv = True
    Manager.switch_to_cb_friendly_attn = switch


# --- The mask of a step


class _Pattern(NamedTuple):
    causal: bool
    window: int  # keys seen on the left of a row's own, and if not causal on the right; -1 = all


def _pattern(mask_function: Callable) -> _Pattern | None:
    """What a mask function of Transformers' own computes; None for one that is not known here."""
    if mask_function is masking_utils.causal_mask_function:
        return _Pattern(True, -1)
    if mask_function is masking_utils.bidirectional_mask_function:
        return _Pattern(False, -1)
    # A window: a closure over its width, intersected with one of these two.
    parts = _captured_by(mask_function, "and_masks.<locals>.and_mask").get("mask_functions", ())
    base = _pattern(parts[1]) if len(parts) == 2 else None
    if base is None or base.window != -1:
        return None
    overlay = "sliding_window_overlay" if base.causal else "sliding_window_bidirectional_overlay"
    width = _captured_by(parts[0], f"{overlay}.<locals>.inner_mask").get("sliding_window")
    if not isinstance(width, int) or width < 1:
        return None
    return _Pattern(base.causal, width - 1 if base.causal else width)


def _captured_by(function: Callable, qualname: str) -> dict[str, Any]:
    """The variables that function has captured, if it is the one of masking_utils so named."""
    where = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if where != (masking_utils.__name__, qualname):
        return {}
    return dict(inspect.getclosurevars(function).nonlocals)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor:
    """The bounds of a step, or a boolean mask [batch, 1, q_length, kv_length].

    attention_mask  bool [batch, tokens] or None; False is padding
    """
    # Neither closures nor the values of a mask can be looked into while torch traces.
    pattern = None if torch.compiler.is_compiling() else _pattern(mask_function)
    if pattern is not None:
        kept = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if kept is not None:
            kept = kept[:, kv_offset : kv_offset + kv_length]
        q_pos = q_offset - kv_offset
        if not isinstance(q_pos, torch.Tensor):  # full, as a copy to a GPU would wait
            q_pos = torch.full((), q_pos, device=device)
        q_pos = q_pos.to(device, torch.int32).reshape(())
        bounds = _bounds(pattern, batch_size, q_length, kv_length, q_pos, kept)
        if bounds is not None:
            return bounds
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )


def _bounds(
    pattern: _Pattern,
    batch: int,
    q_len: int,
    kv_len: int,
    q_pos: torch.Tensor,
    kept: torch.Tensor | None,
) -> torch.Tensor | None:
    """Bounds as the module describes them, or None if there is padding between tokens.

    q_pos  i32 [] position of the first row among the keys
    kept   bool [batch, kv_len] or None; False is padding
    """
    # A static cache has slots behind the last row, which no causal row sees.
    end = (q_pos + q_len).clamp(0, kv_len) if pattern.causal else torch.full_like(q_pos, kv_len)
    begin, end = torch.zeros_like(q_pos).expand(batch), end.expand(batch)
    if kept is not None:
        kept = kept.to(torch.int32)
        count = kept.sum(1, dtype=torch.int32)
        first = kept.argmax(1).to(torch.int32)  # argmax is the first of the largest
        behind = kept.flip(1).argmax(1)
        if not bool(((first + count + behind == kv_len) | (count == 0)).all()):
            return None
        begin, end = torch.minimum(first, end), torch.minimum(first + count, end)
    bounds = torch.stack([begin, end, q_pos.expand(batch)], dim=1)
    return bounds[:, None, None].expand(batch, 1 if pattern.causal else 2, 2 + pattern.window, 3)


# --- One layer


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """One layer of attention, as Transformers' models call it.

    query           [batch, num_qo_heads, q_len, head_dim]
    key, value      [batch, num_kv_heads, kv_len, head_dim]; that of value may differ
    attention_mask  bounds; or a mask [batch or 1, 1, q_len, kv_len], True or 0 = seen; or None: the rows
                    are the last of the keys, causal if the module is
    s_aux           [num_qo_heads] sinks
    returns         [batch, q_len, num_qo_heads, head_dim of value], and None for the weights
    """
    if dropout:
        raise NotImplementedError(f"dropout: expected 0, got {dropout}")
    for name in ("output_attentions", "position_bias"):
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise NotImplementedError(f"{name}: not offered by attn_implementation={NAME!r}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = sliding_window - 1 if sliding_window else -1
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        if attention_mask.ndim != 4 or attention_mask.shape[3] != 3:
            raise ValueError(
                "attention_mask: expected bounds [batch, 1 or 2, 2 + window, 3] of i32, got "
                f"{list(attention_mask.shape)}"
            )
        causal, window = attention_mask.shape[1] == 1, attention_mask.shape[2] - 2
    elif attention_mask is None and window >= 0 and not causal:
        raise NotImplementedError("sliding_window: expected a mask with it where rows see later keys")
    options = (
        causal,
        window,
        query.shape[3] ** -0.5 if scaling is None else scaling,
        softcap or 0.0,
        None if s_aux is None else s_aux.detach().to(torch.float32),
    )
    # The operators of torch take twice the time of what they call, and serve tracing and autograd.
    direct = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    if kwargs.get("cu_seq_lens_q") is None:
        attend = _attend_impl if direct else _attend
        return attend(query, key, value, attention_mask, *options), None
    attend = _attend_packed_impl if direct else _attend_packed
    packed = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], kwargs["max_length_q"]
    return attend(query, key, value, *packed, *options), None


def _fake(q, k, v, *args):
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _attend_impl(q, k, v, mask, causal, window, scale, softcap, sink, traced=False):
    batch, heads, q_len, _ = q.shape
    if q.numel() == 0:
        return _fake(q, k, v)
    dense = mask is not None and mask.dtype != torch.int32
    if dense:
        mask_rule, window, kv_len = "custom", -1, min(k.shape[2], mask.shape[3])
    else:
        mask_rule, kv_len = "causal" if causal else "none", k.shape[2]
    (k, v), step = _in_place(k, v)
    operator = _operator(
        q, k, v, mask_rule, window, softcap, sink, q_len, 2 * batch - 1, batch * q_len
    )
    operator.plan(
        [] if mask is None else [mask],
        (batch, q_len, kv_len, step),
        batch * q_len,
        lambda: _batch_arrays(mask, dense, batch, q_len, kv_len, step, q.device),
        reusable=not traced and not (dense and mask.is_inference()),
    )
    rows = q.transpose(1, 2).reshape(batch * q_len, heads, q.shape[3])
    o = operator.attention.run(rows, k, v, sm_scale=scale, sink=sink)
    return o.view(batch, q_len, heads, v.shape[2])


def _attend_packed_impl(
    q, k, v, cu_q, cu_k, max_q_len, causal, window, scale, softcap, sink, traced=False
):
    """Requests one behind another in a batch of 1, as continuous batching hands them over."""
    tokens = q.shape[2]
    # Rows of no request are padding of the step's size: not written, and not to become NaN later.
    o = q.new_zeros((tokens, q.shape[1], v.shape[3]))
    (k, v), _ = _in_place(k, v)
    rule = "causal" if causal else "none"
    requests = cu_q.shape[0] - 1
    operator = _operator(q, k, v, rule, window, softcap, sink, max_q_len, requests, tokens)
    operator.plan(
        [cu_q, cu_k],
        (tokens,),
        tokens,
        lambda: {"qo_indptr": cu_q.to(torch.int32), "kv_indptr": cu_k.to(torch.int32)},
        reusable=not traced,
    )
    operator.attention.run(q[0].transpose(0, 1), k, v, o=o, sm_scale=scale, sink=sink)
    return o[None]


# Operators of torch, so that a traced model has each layer's attention as one node. Each plans anew, since
# compiled code writes into tensors that it no longer needs without telling; and what a plan holds must not
# lie in the memory of reduce-overhead, whose graphs therefore leave them out.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_OPTIONS = "bool causal, int window, float scale, float softcap, Tensor? sink) -> Tensor"
_attend = _define(
    f"transformers_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, {_OPTIONS}",
    functools.partial(_attend_impl, traced=True),
    _fake,
    _TAGS,
)
_attend_packed = _define(
    "transformers_packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, "
    f"int max_q_len, {_OPTIONS}",
    functools.partial(_attend_packed_impl, traced=True),
    _fake,
    _TAGS,
)


def _refuse_gradient(ctx, *gradients):
    raise NotImplementedError(f"backward: no gradients through attn_implementation={NAME!r}")


for _operation in (_attend, _attend_packed):
    torch.library.register_autograd(_operation, _refuse_gradient)


# --- The index arrays of a batch


def _in_place(k: torch.Tensor, v: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Keys and values [batch, heads, tokens, dim] as ragged ones [heads, rows, dim], and how many rows
    apart the requests begin; in place where the strides allow, as those of all usual caches do."""
    steps = {_step(k), _step(v)}
    if len(steps) > 1 or None in steps:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        steps = {k.shape[2]}
    step = steps.pop()
    rows = (k.shape[0] - 1) * step + k.shape[2]
    return [x.as_strided((x.shape[1], rows, x.shape[3]), x.stride()[1:]) for x in (k, v)], step


def _step(x: torch.Tensor) -> int | None:
    """Rows from one request's tokens to the next one's, where a row is as far from its neighbour as
    tokens are; None if that is no whole number, or rows no i32."""
    batch, _, tokens, _ = x.shape
    between, _, stride, inner = x.stride()
    if inner != 1:
        return None
    if batch == 1:
        return tokens
    if stride == 0 or between % stride:
        return None
    step = between // stride
    return step if step >= tokens and batch * step < 2**31 else None


def _batch_arrays(
    mask: torch.Tensor | None,
    dense: bool,
    batch: int,
    q_len: int,
    kv_len: int,
    step: int,
    device: torch.device,
) -> dict[str, Any]:
    """What plan takes. Each request is followed by one without rows, which has the keys up to the
    next request's first: offsets of ragged keys leave no gaps."""
    each = torch.arange(batch, dtype=torch.int32, device=device)
    arrays = {"qo_indptr": _begins_and_ends(each * q_len, each * q_len + q_len)}
    if mask is None or dense:
        begin, end = each * step, each * step + kv_len
        q_pos = torch.full_like(each, kv_len - q_len)
    else:
        begin, end, q_pos = mask[:, 0, 0].to(device).unbind(1)
        q_pos = q_pos - begin  # the operator counts from the first key that it is given
        begin, end = begin + each * step, end + each * step
    arrays["kv_indptr"] = _begins_and_ends(begin, end)
    arrays["qo_pos"] = _begins_and_ends(q_pos, torch.zeros_like(q_pos))[:-1]
    if dense:
        bits = _bits(mask, batch, q_len, kv_len)
        each = each.long() * bits.shape[1]
        arrays["mask_bits"] = bits.flatten()
        arrays["mask_indptr"] = _begins_and_ends(each, each + bits.shape[1])
    return arrays


def _begins_and_ends(begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """[begin[0], end[0], begin[1], end[1], ...]: request 2i is the i-th, request 2i + 1 the gap."""
    return torch.stack([begin, end], dim=1).flatten()


def _bits(mask: torch.Tensor, batch: int, q_len: int, kv_len: int) -> torch.Tensor:
    """A mask [batch or 1, 1, q_len or 1, >= kv_len] as u8 [batch, bytes], the lowest bit first."""
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise NotImplementedError(
            f"attention_mask: expected [batch, 1, q_len, kv_len], one for all heads, got "
            f"{list(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        seen = mask == 0
        if not bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            raise NotImplementedError(
                "attention_mask: expected 0 or the least number, got other values: a bias is not offered"
            )
        mask = seen
    flat = mask[:, 0, :, :kv_len].expand(batch, q_len, kv_len).reshape(batch, -1)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).view(batch, -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat.to(torch.uint8) << places).sum(2, dtype=torch.uint8)


# --- Operators


class _Operator:
    """An attention operator with limits that grow, and what its plan was made of."""

    def __init__(self, spec: dict[str, Any], requests: int, tokens: int):
        self.attention = qkv.attention.Attention(
            **spec,
            max_requests=requests,
            max_tokens=tokens,
            max_kv_len=2**30,  # costs nothing
        )
        self.requests, self.tokens = requests, tokens
        self.on_gpu = spec["device"] != "cpu"
        self.planned: tuple | None = None
        self.held: tuple = ()
        self.in_graph = False

    def plan(
        self,
        sources: list[torch.Tensor],
        shape: tuple[int, ...],
        rows: int,
        make: Callable[[], dict[str, Any]],
        reusable: bool,
    ) -> None:
        """Plan make() for rows of q, unless the plan in force was made of the same tensors, unchanged
        since then, and shape.

        The tensors are held, so an id says which one it is. reusable: their versions say whether they have
        changed. What is captured has its plan in the graph too, since a replay finds other plans in
        force, and leaves its own behind.
        """
        if self.on_gpu and not self.in_graph and torch.cuda.is_current_stream_capturing():
            self.in_graph, self.planned = True, None
            _in_graphs.append(self)
        versions = [0 if t.is_inference() else t._version for t in sources]
        planned = (shape, [id(t) for t in sources], versions)
        if planned == self.planned:
            return
        self.planned = None
        arrays = make()
        if self.on_gpu:  # where plan cannot look into the arrays
            arrays["max_tokens"] = rows
        self.attention.plan(**arrays)
        self.held = (sources, arrays)
        if reusable and not self.in_graph:
            self.planned = planned


# Graphs use the memory of their operators for as long as they live, which is not known here.
_in_graphs: list[_Operator] = []


class _OfThread(threading.local):
    """An operator serves one thread, and one stream, at a time."""

    def __init__(self):
        self.operators: dict[tuple, _Operator] = {}


_of_thread = _OfThread()

_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def _operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: str,
    window: int,
    softcap: float,
    sink: torch.Tensor | None,
    max_q_len: int,
    requests: int,
    tokens: int,
) -> _Operator:
    """The operator of these layers, of limits that suffice. q is [batch, heads, rows, dim]; k, v are
    [heads, rows, dim]."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.dtype not in _DTYPES:
            raise NotImplementedError(f"{name}: expected f32, f16 or bf16, got {x.dtype}")
    if v.dtype != k.dtype:
        raise NotImplementedError(f"value: expected {k.dtype} as key has, got {v.dtype}")
    spec = {
        "num_qo_heads": q.shape[1],
        "num_kv_heads": k.shape[0],
        "head_dim_qk": k.shape[2],
        "head_dim_vo": v.shape[2],
        "kv_layout": "HND",
        "mask": mask,
        "dtype_q": _DTYPES[q.dtype],
        "dtype_kv": _DTYPES[k.dtype],
        "dtype_o": _DTYPES[q.dtype],
        "logits_soft_cap": softcap,
        "window_left": window,
        "window_right": -1 if mask == "causal" else window,
        "sink": sink is not None,
        "max_qo_len": 1 if max_q_len == 1 else 0,  # decode has kernels of its own
        "device": str(q.device),
    }
    operators = _of_thread.operators
    on_gpu = q.device.type == "cuda"
    stream = torch.cuda.current_stream(q.device).cuda_stream if on_gpu else 0
    key = (*spec.values(), stream)
    found = operators.get(key)
    if found is None or requests > found.requests or tokens > found.tokens:
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "stream: expected a step of this size before its capture, on the stream that is captured"
            )
        if found is not None:
            requests, tokens = max(requests, found.requests), max(tokens, found.tokens)
        found = operators[key] = _Operator(
            spec, 1 << (requests - 1).bit_length(), 1 << (tokens - 1).bit_length()
        )
    return found


register()
