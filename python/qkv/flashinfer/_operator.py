"""What the wrappers share: Attention objects that grow with the batches that come.

FlashInfer's plan takes lengths and makes room for them; qkv's Attention is created for limits. An
Operator keeps one Attention for each spec and creates a larger one, in powers of two, when a batch
does not fit. The outgrown one stays alive: a captured graph may still run it."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple
from collections.abc import Sequence

import torch

import qkv
from qkv.attention import Attention

from .utils import alibi_slopes, canonicalize_torch_dtype, next_positive_power_of_2

MAX_LEN = 1 << 30

# A paged cache: [pages, 2, ...] or (k, v).
Cache = torch.Tensor | Sequence[torch.Tensor]


class Options(NamedTuple):
    """What run (or the older forward) may still change after plan, and needs its own Attention."""

    causal: bool = False
    window_left: int = -1
    soft_cap: bool = False
    pos_encoding: str = "NONE"
    rope_scale: float = 1.0
    rope_theta: float = 1e4
    sink: bool = False

    @classmethod
    def make(
        cls,
        causal: bool,
        window_left: int,
        logits_soft_cap: float | None,
        pos_encoding: str,
        rope_scale: float | None,
        rope_theta: float | None,
        sink: bool = False,
    ) -> Options:
        """Of what callers say; None is the default. What has no effect is left out, so that equal
        Attentions have equal options."""
        soft_cap = (logits_soft_cap or 0.0) > 0.0
        if pos_encoding != "ROPE_LLAMA":
            return cls(causal, window_left, soft_cap, pos_encoding, sink=sink)
        return cls(causal, window_left, soft_cap, pos_encoding, rope_scale or 1.0, rope_theta or 1e4, sink)

    def spec(self) -> dict[str, Any]:
        """The arguments of Attention."""
        if self.pos_encoding not in ("NONE", "ROPE_LLAMA", "ALIBI"):
            raise KeyError(f"pos_encoding_mode: expected NONE, ROPE_LLAMA or ALIBI, got {self.pos_encoding!r}")
        rope = self.pos_encoding == "ROPE_LLAMA"
        return {
            "mask": "causal" if self.causal else "none",
            "window_left": self.window_left,
            # A stand-in: every run brings its own.
            "logits_soft_cap": 1.0 if self.soft_cap else 0.0,
            "alibi": self.pos_encoding == "ALIBI",
            "rope": qkv.Rope(theta=self.rope_theta, scale=self.rope_scale) if rope else None,
            "sink": self.sink,
        }


class Model(NamedTuple):
    """What plan fixes besides."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int
    kv_layout: str
    dtype_q: torch.dtype
    dtype_kv: torch.dtype
    dtype_o: torch.dtype
    max_qo_len: int = 0
    max_levels: int = 1
    batch_invariant: bool = False
    custom_mask: bool = False


class Operator:
    """One batch, planned for each of the Options that runs ask for.

    fixed: the limits of the first plan stay (graphs are captured with it), and more is an error."""

    def __init__(self, device: torch.device, fixed: bool = False) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._fixed = fixed
        self._attentions: dict[tuple[Model, Options], tuple[Attention, dict[str, int]]] = {}
        self._outgrown: list[Attention] = []
        self._planned: dict[Options, Attention] = {}
        self._ran: dict[Options, None] = {}
        self._default: Options | None = None

    def set(self, model: Model, need: dict[str, int], batch: dict[str, Any]) -> None:
        """Takes a batch (arguments of Attention.plan) and the limits that it needs; the first run
        plans it."""
        first = batch["levels"][0] if "levels" in batch else batch
        if first["qo_indptr"].device.type != "cpu":
            batch["max_tokens"] = need["max_tokens"]
        self._model, self._need, self._batch = model, need, batch
        self._planned = {}

    def plan(self, model: Model, need: dict[str, int], batch: dict[str, Any], options: Options) -> None:
        """Takes a batch and plans it, at once, for what will likely run: what the last step's runs
        asked for, with these options where they asked for those of the last plan. When fixed,
        for all that ever ran: its graphs will be replayed."""
        self.set(model, need, batch)
        wanted = self._ran
        if not self._fixed:
            wanted = {options if each == self._default else each: None for each in wanted}
            self._ran = {}
        self._default = options
        for each in wanted or {options: None}:
            self._plan(each)

    def replan(self) -> None:
        """Plans the same arrays again, after their content has changed in place."""
        for attention in self._planned.values():
            attention.plan(**self._batch)

    def get(self, options: Options) -> Attention:
        """The Attention under which the batch is planned."""
        self._ran[options] = None
        return self._planned.get(options) or self._plan(options)

    def _plan(self, options: Options) -> Attention:
        attention = self._attention(self._model, options)
        attention.plan(**self._batch)
        self._planned[options] = attention
        return attention

    def _attention(self, model: Model, options: Options) -> Attention:
        attention, limits = self._attentions.get((model, options), (None, {}))
        if attention is not None and all(limits[n] >= k for n, k in self._need.items()):
            return attention
        if attention is not None and self._fixed:
            over = next(n for n, k in self._need.items() if limits[n] < k)
            raise ValueError(
                f"{over}: expected at most {limits[over]} as in the first plan, since graphs may "
                f"have been captured, got {self._need[over]}"
            )
        if self._fixed:
            limits = {n: max(k, 1) for n, k in self._need.items()}
        else:
            limits = {n: max(next_positive_power_of_2(k), limits.get(n, 16)) for n, k in self._need.items()}
        if model.batch_invariant:
            # Its workspace grows with max_kv_len; of others it does not.
            pages = limits["max_pages"] * model.page_size
            max_kv_len = min(pages or limits["max_kv_len"], MAX_LEN)
        else:
            max_kv_len = MAX_LEN
        if attention is not None:
            self._outgrown.append(attention)
        spec = model._asdict() | options.spec()
        if spec.pop("custom_mask"):
            spec["mask"] = "custom"
        device = str(self.device)
        spec |= {n: k for n, k in limits.items() if n != "max_kv_len"}
        attention = Attention(**spec, max_kv_len=max_kv_len, lse_base_2=True, device=device)
        self._attentions[model, options] = attention, limits
        return attention


_shared = threading.local()


def shared_operator(device: torch.device, key: Any = None) -> Operator:
    """The operator of the functions that have no wrapper: one for each thread, device and key, or
    without a key the current stream."""
    if key is None:
        key = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    operators = _shared.__dict__.setdefault("operators", {})
    found = operators.get((device, key))
    if found is None:
        found = operators[device, key] = Operator(device)
    return found


def data_types(
    q_data_type: torch.dtype | str | None,
    kv_data_type: torch.dtype | str | None,
    o_data_type: torch.dtype | str | None,
    data_type: torch.dtype | str | None = None,
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of q, of the cache and of the output, as plan's defaults are."""
    q = canonicalize_torch_dtype(q_data_type or data_type or "float16")
    kv = canonicalize_torch_dtype(kv_data_type or data_type or q)
    return q, kv, canonicalize_torch_dtype(o_data_type or q)


def together(device: torch.device, *arrays: torch.Tensor, non_blocking: bool = True) -> list[torch.Tensor]:
    """Index arrays as i32 on one side: the GPU if one of them is there, else the host."""
    on_device = device.type != "cpu" and any(a.device.type != "cpu" for a in arrays)
    where = device if on_device else torch.device("cpu")
    return [a.to(where, torch.int32, non_blocking=non_blocking) for a in arrays]


def full_last_page(last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """0 means a full page."""
    return last_page_len.masked_fill(last_page_len < 1, page_size)


def split_cache(cache: Cache) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(k, v) of a pair, or (the 5-D tensor of both, None)."""
    if isinstance(cache, torch.Tensor):
        return cache, None
    k, v = cache
    return k, v


def as_scale(scale: float | torch.Tensor | None) -> float | torch.Tensor | None:
    """A tensor of one element, or of one for each head, as f32 [n]."""
    if isinstance(scale, torch.Tensor):
        return scale.reshape(-1).float()
    return scale


def run(
    operator: Operator,
    options: Options,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    *,
    out: torch.Tensor | None,
    lse: torch.Tensor | bool | None,
    sm_scale: float | None = None,
    logits_soft_cap: float | None = None,
    q_scale: float | torch.Tensor | None = None,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> Any:
    """One layer: out, or (out, lse)."""
    slopes = None
    if options.pos_encoding == "ALIBI":
        slopes = alibi_slopes(q.shape[1], q.device)
    return operator.get(options).run(
        q,
        k,
        v,
        o=out,
        lse=lse,
        sm_scale=sm_scale or 0.0,
        logits_soft_cap=logits_soft_cap or 0.0,
        q_scale=as_scale(q_scale),
        k_scale=as_scale(k_scale),
        v_scale=as_scale(v_scale),
        sink=sinks,
        alibi_slopes=slopes,
    )
