"""Models. Importing this package registers them with timm."""

from evit.models.lvvit import LVViT
from evit.models.registry import DynamicViT, EViT, ReducedViT, create_model, reduce
from evit.models.weights import load_checkpoint

__all__ = ["DynamicViT", "EViT", "LVViT", "ReducedViT", "create_model", "load_checkpoint", "reduce"]
