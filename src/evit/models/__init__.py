"""Models. Importing this package registers them with timm."""

from evit.models.lvvit import LVViT
from evit.models.registry import create_model
from evit.models.vit import DynamicViT, EViT, ReducedViT, reduce
from evit.models.weights import load_checkpoint

__all__ = ["DynamicViT", "EViT", "LVViT", "ReducedViT", "create_model", "load_checkpoint", "reduce"]
