"""A Vision Transformer small enough for every test, and each way to reduce it."""

import pickle
from typing import Any

import numpy as np
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import evit

SIZE = dict(img_size=32, patch_size=4, embed_dim=48, depth=5, num_heads=3, num_classes=7)
PATCHES = 64
AT, COUNTS = (1, 2, 3), [40, 24, 14]
# Of the methods that copy tokens and mix none: patches that are not kept are dropped.
DROPS = ("ats", "drop", "dynamicvit", "random", "topk")


def vit(distilled: bool = False, **kwargs: Any) -> Any:
    """timm's model, with weights from a fixed seed that tell tokens, heads and blocks apart."""
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(**SIZE | kwargs)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = torch.randn(p.shape, generator=draw)
            if p.ndim == 1:
                p.copy_(1 + 0.1 * z if name.endswith("weight") else 0.02 * z)
            else:
                p.copy_(0.3 * z if p.ndim == 3 else z * p[0].numel() ** -0.5)
    return model.eval()


def reduced(name: str, model: Any = None, **options: Any) -> Any:
    """The model (default: vit()) reduced by a method, to COUNTS unless options say otherwise."""
    torch.manual_seed(0)  # of parameters that a method adds
    how = options if {"counts", "keep_rate"} & set(options) else dict(counts=COUNTS) | options
    return evit.reduce(vit() if model is None else model, name, **dict(at=AT) | how).eval()


def images(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """model(*args, **kwargs), with the same draws each time."""
    torch.manual_seed(2)
    return model(*args, **kwargs)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Gradients of every parameter in training, by name."""
    model.train().zero_grad()
    run(model, x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@torch.no_grad()
def logits_of(models: bytes, x: np.ndarray) -> list[np.ndarray]:
    """Logits by models that were pickled: what another process is given to do."""
    return [model(torch.from_numpy(x)).numpy() for model in pickle.loads(models)]
