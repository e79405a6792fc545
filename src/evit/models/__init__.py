"""Models. Importing this package registers them with timm."""

from evit.models.vit import EViT
from evit.models.weights import load_checkpoint

__all__ = ["EViT", "load_checkpoint"]
