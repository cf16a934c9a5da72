"""What an engine finds where FlashInfer has a name and this package has none."""

from __future__ import annotations

from typing import Any
from collections.abc import Callable


class NotOffered(NotImplementedError, AttributeError):
    """A name that is not offered. Also an AttributeError, so that hasattr() and getattr() with a
    default, with which engines look for features, answer "no" instead of failing."""


def missing(module: str) -> Callable[[str], Any]:
    """The module's __getattr__."""
    shown = module.removeprefix("qkv.")

    def getattr_of_module(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise NotOffered(f"{shown}.{name}: not offered by qkv.flashinfer")

    return getattr_of_module


def refuse(**options: Any) -> None:
    """NotImplementedError for the first option that is set (neither None nor False)."""
    for name, value in options.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}: not offered by qkv.flashinfer, expected None")
