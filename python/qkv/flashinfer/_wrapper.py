"""The base of the wrappers: what plan remembers under the names that engines look at."""

from __future__ import annotations

from typing import Any
from collections.abc import Sequence

import torch

from ._missing import refuse
from ._operator import Model, Operator, Options, run


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
        rope = self._pos_encoding_mode == "ROPE_LLAMA"
        return Options(
            self._causal,
            window_left,
            self._logits_soft_cap > 0.0,
            self._pos_encoding_mode,
            (self._rope_scale or 1.0) if rope else 1.0,
            (self._rope_theta or 1e4) if rope else 1e4,
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
        if self._operator.device.type == "cuda" and batch_on_device(batch):
            batch["max_tokens"] = need["max_tokens"]
        self._operator.plan(model, need, batch, self._plain)

    def _run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        args: Sequence[Any],
        *,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        return_lse: bool,
        window_left: int | None = None,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> Any:
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


def batch_on_device(batch: dict[str, Any]) -> bool:
    """Are a batch's index arrays on the GPU?"""
    first = batch["levels"][0] if "levels" in batch else batch
    return first["qo_indptr"].device.type != "cpu"


def copy_indices(buffer: torch.Tensor, indices: torch.Tensor, non_blocking: bool) -> None:
    """Into the caller's buffer, unless they were written there in the first place."""
    if len(indices) > len(buffer):
        raise ValueError(
            f"indices: expected at most the {len(buffer)} entries of the buffer given for CUDA "
            f"graphs, got {len(indices)}"
        )
    if buffer.data_ptr() != indices.data_ptr():
        buffer[: len(indices)].copy_(indices, non_blocking=non_blocking)


def check_batch_size(expected: int, got: int) -> None:
    if expected != got:
        raise ValueError(
            f"last_page_len: expected the {expected} requests of the buffers given for CUDA graphs, got {got}"
        )
