"""EViT: Vision Transformers that keep the tokens their class token attends to."""

from evit import measure
from evit.models import DynamicViT, EViT, LVViT, load_checkpoint, reorganize

__version__ = "0.1.0"
__all__ = ["DynamicViT", "EViT", "LVViT", "load_checkpoint", "measure", "reorganize"]
