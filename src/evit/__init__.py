"""EViT: Vision Transformers that keep the tokens their class token attends to."""

from evit import measure
from evit.models import EViT, load_checkpoint

__version__ = "0.1.0"
__all__ = ["EViT", "load_checkpoint", "measure"]
