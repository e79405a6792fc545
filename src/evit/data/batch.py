"""Operations on a whole batch on the training device: normalise, erase, mix."""

import functools
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from evit.config import Recipe

Colour = tuple[float, float, float]


@functools.cache
def per_channel(colour: Colour, device: torch.device) -> Tensor:
    """A colour as (3, 1, 1); kept on the device, as every copy to a GPU waits for it."""
    return torch.tensor(colour, device=device).view(3, 1, 1)


def normalize(images: Tensor, mean: Colour = MEAN, std: Colour = STD) -> Tensor:
    """uint8 images (B, 3, H, W) to float32, with the mean and standard deviation of each colour."""
    shift, scale = (per_channel(tuple(v), images.device) for v in (mean, std))
    return images.to(torch.float32, copy=True).sub_(255 * shift).div_(255 * scale)


def denormalize(images: Tensor, mean: Colour = MEAN, std: Colour = STD) -> Tensor:
    """The uint8 images that normalize() was given."""
    shift, scale = (per_channel(tuple(v), images.device) for v in (mean, std))
    return (255 * (images * scale + shift)).round().clamp(0, 255).to(torch.uint8)


def augment_batch(images: Tensor, *more: Any, random_erasing: float = 0.0) -> tuple[Any, ...]:
    """DeiT's random erasing of normalised images (B, 3, H, W), in place: with this probability, a
    rectangle of 2 to 33 % of an image becomes noise. The rest of the batch is returned as it is."""
    if random_erasing:
        images = RandomErasing(random_erasing, mode="pixel", device=images.device)(images)
    return images, *more


def make_mixup(recipe: Recipe, num_classes: int, batch_size: int) -> Mixup | None:
    """timm's Mixup, or None where both are off: (images, labels) -> images, targets (B, classes).

    One draw for a batch, a pair or each image (recipe.mixup_mode), from numpy's global generator.
    Works on the images in place.
    """
    if not (recipe.mixup > 0 or recipe.cutmix > 0):
        return None
    if batch_size % 2:
        raise ValueError(
            f"mixup and cutmix pair the images of a batch, and {batch_size} images per process is "
            f"odd: choose another recipe.batch_size, or recipe.mixup=0 recipe.cutmix=0"
        )
    alphas, how = (recipe.mixup, recipe.cutmix), (recipe.mixup_switch_prob, recipe.mixup_mode)
    return Mixup(*alphas, None, 1.0, *how, True, recipe.label_smoothing, num_classes)


def mix_token_box(grid: tuple[int, int]) -> Tensor:
    """MixToken's patches (H, W), True where those of the flipped batch go: a box, as in CutMix.

    Its area is 1 - Beta(1, 1) of the grid where the border does not cut it. Drawn from numpy's
    global generator, one for a batch.
    """
    side = (1 - np.random.beta(1.0, 1.0)) ** 0.5
    inside = torch.zeros(grid, dtype=torch.bool)
    box = []
    for size in grid:
        centre, half = np.random.randint(size), int(size * side) // 2
        box.append(slice(max(centre - half, 0), centre + half))
    inside[tuple(box)] = True
    return inside
