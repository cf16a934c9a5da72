"""The base of the wrappers: what plan remembers under the names that engines look at."""

from __future__ import annotations

from typing import Any
from collections.abc import Sequence

import torch

from ._missing import refuse
from ._operator import Cache, Model, Operator, Options, run, split_cache


class _PlanOfBuffers:
    """What engines find as wrapper._cached_module: after copying a step's lengths into the
    wrapper's buffers they call its plan, whose arguments have changed with each release. All that
    it needs is in the buffers."""

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    def plan(self, *args: Any, **kwargs: Any) -> None:
        self._operator.replan()


class Wrapper:
    """plan and run over one Operator. Workspaces are accepted and not used: qkv sizes its own."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        jit_args: Any = None,
        jit_kwargs: Any = None,
    ) -> None:
        refuse(jit_args=jit_args, jit_kwargs=jit_kwargs)
        if kv_layout not in ("NHD", "HND"):
            raise KeyError(f"kv_layout: expected NHD or HND, got {kv_layout!r}")
        self.device = float_workspace_buffer.device
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer: torch.Tensor | None = None
        self._pin_memory_int_workspace_buffer: torch.Tensor | None = None
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._operator = Operator(self.device, fixed=use_cuda_graph)
        self._cached_module = _PlanOfBuffers(self._operator)
        self._total_rows: int | None = None
        self._remember(False, "NONE", -1, None, None, None, None)

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self,
        float_workspace_buffer: torch.Tensor,
        int_workspace_buffer: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Accepted: nothing here lies in a caller's workspace."""
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = int_workspace_buffer

    def end_forward(self) -> None:
        """Does nothing."""

    def _remember(
        self,
        causal: bool,
        pos_encoding_mode: str,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
        rope_scale: float | None,
        rope_theta: float | None,
    ) -> None:
        self._causal = causal
        self._pos_encoding_mode = pos_encoding_mode
        self._window_left = window_left
        self._logits_soft_cap = logits_soft_cap or 0.0
        self._sm_scale = sm_scale
        self._rope_scale = rope_scale
        self._rope_theta = rope_theta
        self._plain = self._options(window_left, False)

    def _options(self, window_left: int, sink: bool) -> Options:
        return Options.make(
            self._causal,
            window_left,
            self._logits_soft_cap,
            self._pos_encoding_mode,
            self._rope_scale,
            self._rope_theta,
            sink,
        )

    def _check_rows(self, q: torch.Tensor) -> None:
        """A graph's q may be padded; else its rows are those planned."""
        if q.shape[0] != self._total_rows:
            if self._total_rows is None:
                raise RuntimeError("run: expected plan to be called first")
            if not self._use_cuda_graph:
                raise ValueError(f"q: expected the {self._total_rows} rows planned, got {q.shape[0]}")

    def _plan(self, model: Model, need: dict[str, int], batch: dict[str, Any]) -> None:
        self._total_rows = need["max_tokens"]
        self._operator.plan(model, need, batch, self._plain)

    def _run(
        self,
        q: torch.Tensor,
        cache: Cache,
        args: Sequence[Any] = (),
        *,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        window_left: int | None = None,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> Any:
        self._check_rows(q)
        if args:
            # fp8: the scales of each head, in this order.
            if len(args) != 3 or not (q_scale is k_scale is v_scale is None):
                raise TypeError(
                    f"run: expected no positional arguments after the cache or the three scales "
                    f"of q, k and v, got {len(args)}"
                )
            q_scale, k_scale, v_scale = args
        if window_left is None and sinks is None:
            options = self._plain
        else:
            window = self._window_left if window_left is None else window_left
            options = self._options(window, sinks is not None)
        k, v = split_cache(cache)
        return run(
            self._operator,
            options,
            q,
            k,
            v,
            out=out,
            lse=(True if lse is None else lse) if return_lse else None,
            sm_scale=self._sm_scale,
            logits_soft_cap=self._logits_soft_cap,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            sinks=sinks,
        )


def check_buffer(name: str, buffer: torch.Tensor | None, entries: int | None = None) -> None:
    """Of a buffer for CUDA graphs: is it there, with as many entries?"""
    got = None if buffer is None else len(buffer)
    if got is None or entries not in (None, got):
        size = "" if entries is None else f" of {entries} entries"
        raise ValueError(f"{name}: expected a tensor{size} with use_cuda_graph, got {got}")


def check_batch_size(name: str, expected: int, got: int) -> None:
    if expected != got:
        raise ValueError(f"{name}: expected the {expected} requests of the buffers given for CUDA graphs, got {got}")


def fill_buffers(
    buffers: Sequence[torch.Tensor], arrays: Sequence[torch.Tensor], page_size: int, non_blocking: bool
) -> None:
    """Copies a step's arrays (each indptr, then indices and last_page_len) into the caller's buffers
    for CUDA graphs, which a captured plan or run reads."""
    *indptrs, indices, last = buffers
    check_batch_size("last_page_len", len(last), len(arrays[-1]))
    used = len(arrays[-2])
    if used > len(indices):
        raise ValueError(
            f"indices: expected at most the {len(indices)} entries of the buffer given for CUDA graphs, got {used}"
        )
    for buffer, array in zip((*indptrs, indices[:used], last), arrays):
        # Unless it was written there in the first place.
        if buffer.data_ptr() != array.data_ptr():
            buffer.copy_(array, non_blocking=non_blocking)
    last.masked_fill_(last < 1, page_size)  # as full_last_page
