"""What happens to a whole batch, on the device that trains: normalisation, mixup, soft labels."""

from collections.abc import Iterator

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from torch import Tensor


def _statistics(device: torch.device) -> Iterator[Tensor]:
    for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        yield torch.tensor(values, device=device).view(3, 1, 1) * 255


def normalize(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) to float32 with ImageNet's mean and standard deviation."""
    mean, std = _statistics(images.device)
    return (images.float() - mean) / std


def denormalize(images: Tensor) -> Tensor:
    """The uint8 images that normalize() was given."""
    mean, std = _statistics(images.device)
    return (images * std + mean).round().clamp(0, 255).to(torch.uint8)


def make_mixup(
    num_classes: int,
    mixup: float,
    cutmix: float,
    switch_prob: float,
    label_smoothing: float,
    batch_size: int,
) -> Mixup | None:
    """timm's Mixup, or None where both are off: (images, labels) -> images, targets (B, classes).

    One draw for a batch, from numpy's global generator. Works on the images in place.

    Raises:
        ValueError: batch_size is odd, so the images of a batch cannot be paired.
    """
    if not (mixup > 0 or cutmix > 0):
        return None
    if batch_size % 2:
        raise ValueError(
            f"mixup and cutmix pair the images of a batch, and {batch_size} images per process is "
            f"odd: choose another recipe.batch_size, or recipe.mixup=0 recipe.cutmix=0"
        )
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        switch_prob=switch_prob,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )
