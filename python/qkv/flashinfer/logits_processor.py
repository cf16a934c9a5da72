"""LogitsPipe and its stages: qkv.logits_processor under FlashInfer's name."""

from __future__ import annotations

import importlib
from typing import Any

from ._missing import missing

_missing_here = missing(__name__)


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        found = getattr(importlib.import_module("qkv.logits_processor"), name, None)
        if found is not None:
            return found
    return _missing_here(name)
