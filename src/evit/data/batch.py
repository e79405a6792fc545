"""What happens to a whole batch, on the device that trains: normalisation, mixup, soft labels."""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from timm.data import Mixup
from torch import Tensor

Colour = tuple[float, float, float]


def normalize(images: Tensor, mean: Colour = MEAN, std: Colour = STD) -> Tensor:
    """uint8 images (B, 3, H, W) to float32, with the mean and standard deviation of each colour."""
    shift, scale = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (mean, std))
    return (images.float() - 255 * shift) / (255 * scale)


def denormalize(images: Tensor, mean: Colour = MEAN, std: Colour = STD) -> Tensor:
    """The uint8 images that normalize() was given."""
    shift, scale = (images.new_tensor(v).view(3, 1, 1) for v in (mean, std))
    return (255 * (images * scale + shift)).round().clamp(0, 255).to(torch.uint8)


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
