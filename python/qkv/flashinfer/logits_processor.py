"""LogitsPipe and its stages: qkv.logits_processor under FlashInfer's name."""

from __future__ import annotations

from qkv.logits_processor import *  # noqa: F403
from qkv.logits_processor import __all__ as __all__

from ._missing import missing

__getattr__ = missing(__name__)
