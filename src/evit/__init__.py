"""Vision Transformers that reduce their tokens as they go: EViT, and ten other methods."""

import importlib
from typing import Any

__version__ = "0.2.0"
__all__ = [
    "DynamicViT",
    "EViT",
    "LVViT",
    "load_checkpoint",
    "measure",
    "reduce",
    "reducers",
    "reorganize",
]


def __getattr__(name: str) -> Any:
    """Import the models when they are first used: commands answer --help without PyTorch."""
    if name in ("measure", "reducers"):
        return importlib.import_module(f"evit.{name}")
    if name in __all__:
        return getattr(importlib.import_module("evit.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
