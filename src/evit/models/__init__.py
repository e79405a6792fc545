"""Models. Importing this package registers them with timm."""

from evit.models.lvvit import LVViT
from evit.models.registry import DynamicViT, EViT, ReducedViT, create_model, reduce, reorganize
from evit.models.weights import load_checkpoint

__all__ = ["DynamicViT", "EViT", "LVViT", "ReducedViT"]
__all__ += ["create_model", "load_checkpoint", "reduce", "reorganize"]
