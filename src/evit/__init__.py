"""Vision Transformers that reduce their tokens as they go: EViT, and eleven other methods."""

import importlib
import sys
from pathlib import Path
from typing import Any

__version__ = "0.2.0"
__all__ = "DynamicViT EViT LVViT load_checkpoint measure reduce reducers reorganize".split()


def __getattr__(name: str) -> Any:
    if name in ("measure", "reducers"):
        return importlib.import_module(f"evit.{name}")
    if name in __all__:
        return getattr(importlib.import_module("evit.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The commands, in src/ or installed, answer --help and mistakes before they import PyTorch; for
# everyone else, `import evit` registers the models with timm.
_script = Path(sys.argv[0] if sys.argv else "").absolute()
if _script.parent != Path(__file__).parents[1] and not _script.name.startswith("evit-"):
    importlib.import_module("evit.models")
