"""The attention operator, one to one with qkv/attention.h: Attention, merge, can_run, workspace_size."""

from ._native import Attention, can_run, merge, workspace_size
from .batch_attention import BatchAttention

__all__ = ["Attention", "BatchAttention", "can_run", "merge", "workspace_size"]
