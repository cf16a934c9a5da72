"""The attention operator, one to one with qkv/attention.h: Attention, merge, can_run, workspace_size."""

from ._native import Attention, can_run, merge, workspace_size

__all__ = ["Attention", "can_run", "merge", "workspace_size"]
