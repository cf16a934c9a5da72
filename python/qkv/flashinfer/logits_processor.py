"""LogitsPipe and its stages: qkv.logits_processor under FlashInfer's name."""

from __future__ import annotations

import importlib
from typing import Any

from ._missing import missing

_missing_here = missing(__name__)


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        stages = importlib.import_module("qkv.logits_processor")
        if name in stages.__all__:
            return getattr(stages, name)
    return _missing_here(name)
