"""Augmentation of both backends: timm's RandAugment; of whole batches: normalise, erase, mix."""

import functools
import math
import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from evit.config import Recipe


@functools.cache
def per_channel(colour: tuple[float, ...], device: torch.device) -> Tensor:
    """A colour as (3, 1, 1). It stays on the device: each copy to a GPU would wait for it."""
    return torch.tensor(colour, device=device).view(3, 1, 1)


def normalize(images: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    """uint8 images (B, 3, H, W) to float32, with the mean and deviation of each colour."""
    shift, scale = (per_channel(tuple(v), images.device) for v in (mean, std))
    return images.to(torch.float32, copy=True).sub_(255 * shift).div_(255 * scale)


def denormalize(images: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    """The uint8 images that normalize() was given."""
    shift, scale = (per_channel(tuple(v), images.device) for v in (mean, std))
    return (255 * (images * scale + shift)).round().clamp(0, 255).to(torch.uint8)


def augment_batch(images: Tensor, *more: Any, random_erasing: float = 0.0) -> tuple[Any, ...]:
    """DeiT's random erasing, in place: with this probability, a part of an image becomes noise."""
    if random_erasing:
        images = RandomErasing(random_erasing, mode="pixel", device=images.device)(images)
    return images, *more


def make_mixup(recipe: Recipe, num_classes: int, batch_size: int) -> Mixup | None:
    """timm's Mixup, or None where both are off; in place, and with numpy's global generator."""
    if not (recipe.mixup > 0 or recipe.cutmix > 0):
        return None
    if batch_size % 2:
        way = "another recipe.batch_size, or recipe.mixup=0 recipe.cutmix=0"
        raise ValueError(f"mixup makes pairs, and {batch_size} images per process is odd: {way}")
    alphas, how = (recipe.mixup, recipe.cutmix), (recipe.mixup_switch_prob, recipe.mixup_mode)
    return Mixup(*alphas, None, 1.0, *how, True, recipe.label_smoothing, num_classes)


def mix_token_box(grid: tuple[int, int]) -> Tensor:
    """MixToken's patches (H, W), True in a box as of CutMix, from numpy's global generator."""
    side = (1 - np.random.beta(1.0, 1.0)) ** 0.5
    inside, box = torch.zeros(grid, dtype=torch.bool), []
    for size in grid:
        centre, half = np.random.randint(size), int(size * side) // 2
        box.append(slice(max(centre - half, 0), centre + half))
    inside[tuple(box)] = True
    return inside


# The operations of timm's "inc1", whose severity increases with the magnitude, in timm's order.
NUM_OPERATIONS = 15
AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD = range(7)
COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(7, 15)
SYNTAX = re.compile(r"rand(-(n[1-9]|(m|mmax)\d+|(p|mstd)\d+(\.\d+)?|inc1))*")


def parse_rand_augment(config: str) -> tuple[Any, ...]:
    """Layers (operations drawn for an image), magnitude, mstd (from N(magnitude, mstd), if infinite
    from 0 to magnitude), probability that one is applied, maximum of the magnitude."""
    if not SYNTAX.fullmatch(config) or "inc1" not in config.split("-"):
        way = "write it as timm does, rand-m9-mstd0.5-inc1 (m, n, p, mstd, mmax; always inc1)"
        raise ValueError(f"recipe.rand_augment={config!r}: {way}")
    found: Any = rand_augment_transform(config, {})
    op = found.ops[0]
    numbers = op.magnitude, op.magnitude_std, op.prob, op.magnitude_max or 10
    return found.num_layers, *map(float, numbers)  # of one type: it is compiled once


def source_of(operation: int, argument: float, width: float, height: float) -> Any:
    """PIL's affine map from a pixel to where it comes from: x, y -> ax + by + c, dx + ey + f."""
    if operation == ROTATE:
        angle = -math.radians(argument % 360.0)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y
    b = argument if operation == SHEAR_X else 0.0
    c = argument * width if operation == TRANSLATE_X else 0.0
    d = argument if operation == SHEAR_Y else 0.0
    f = argument * height if operation == TRANSLATE_Y else 0.0
    return 1.0, b, c, d, 1.0, f


def warp_of(steps: Any) -> np.ndarray:
    """The affine map (2, 3) of (operation, argument) pairs, in turn, on the unit square."""
    warp = np.eye(3)
    for operation, argument in steps:
        warp = warp @ np.reshape([*source_of(operation, argument, 1.0, 1.0), 0, 0, 1], (3, 3))
    return warp[:2].astype(np.float32)


class PILRandAugment:
    """timm's RandAugment: a PIL image gives an image, and the map of warp_of. Bicubic, as DeiT's.
    Draws from the global generators of `random` and numpy."""

    def __init__(self, config: str, fill: tuple[int, ...]):
        options = dict(img_mean=fill, interpolation=Image.Resampling.BICUBIC)
        self.transform: Any = rand_augment_transform(config, options)
        for operation, op in enumerate(self.transform.ops):
            op.aug_fn = functools.partial(self._apply, operation, op.aug_fn)

    def _apply(self, operation: int, function: Any, image: Any, *arguments: Any, **more: Any):
        self.applied.append((operation, arguments[0] if arguments else 0.0))
        return function(image, *arguments, **more)

    def __call__(self, image: Image.Image) -> tuple[Image.Image, np.ndarray]:
        self.applied: list[tuple[int, float]] = []
        return self.transform(image), warp_of(self.applied)
