"""EViT: Vision Transformers that keep the tokens their class token attends to."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["DynamicViT", "EViT", "LVViT", "load_checkpoint", "measure", "reorganize"]


def __getattr__(name: str) -> Any:
    """Import the models when they are first used: commands answer --help without PyTorch."""
    if name == "measure":
        return importlib.import_module("evit.measure")
    if name in __all__:
        return getattr(importlib.import_module("evit.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
