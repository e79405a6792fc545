"""Vision Transformers that reduce their tokens as they go: EViT, and ten other methods."""

from evit import measure, reducers
from evit.models import DynamicViT, EViT, LVViT, load_checkpoint, reduce, reorganize

__version__ = "0.1.0"
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
