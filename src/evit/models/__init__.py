"""Models. Importing this package registers them with timm."""

from evit.models.dynamicvit import DynamicLVViT, DynamicViT
from evit.models.lvvit import LVViT
from evit.models.pretrained import create_model
from evit.models.vit import EViT, reorganize
from evit.models.weights import load_checkpoint

__all__ = [
    "DynamicLVViT",
    "DynamicViT",
    "EViT",
    "LVViT",
    "create_model",
    "load_checkpoint",
    "reorganize",
]
