"""Crops, RandAugment and colour jitter, drawn for the images of a batch, each from its own seed."""

from __future__ import annotations

import numba
import numpy as np

from evit.data import randaugment
from evit.data.ffcv import augment
from evit.data.ffcv._ffcv import get_random_crop
from evit.data.randaugment import RandAugment, source_of, warp_of

_get_random_crop = numba.njit(get_random_crop)  # torchvision's RandomResizedCrop.get_params

JITTER = np.array([augment.BRIGHTNESS, augment.CONTRAST, augment.COLOR])
NUM_OPERATIONS = len(randaugment.OPERATIONS)
SALT = np.uint32(0x9E3779B9)


@numba.njit(cache=True, nogil=True)
def random_crops(heights, widths, seeds, scale, ratio, flip):
    """Boxes (B, 4) of top, left, height, width, and flips (B,), each from its own seed."""
    boxes = np.empty((len(seeds), 4), np.int64)
    flips = np.empty(len(seeds), np.bool_)
    for k in range(len(seeds)):
        np.random.seed(seeds[k])
        boxes[k] = _get_random_crop(heights[k], widths[k], scale, ratio)
        flips[k] = np.random.random() < flip
    return boxes, flips


def center_crops(
    heights: np.ndarray, widths: np.ndarray, img_size: int, crop_pct: float
) -> np.ndarray:
    """Boxes (B, 4) of top, left, height, width that torchvision's Resize(int(img_size / crop_pct))
    and CenterCrop(img_size) leave of each image, to the nearest pixel."""
    sizes = np.stack([heights, widths]).astype(np.int64)
    short = sizes.min(0)
    resized_short = int(img_size / crop_pct)
    resized = resized_short * sizes // short
    side = np.clip(np.rint(img_size * short / resized_short), 1, short)
    offset = np.rint(np.rint((resized - img_size) / 2) * sizes / resized)
    offset = np.clip(offset, 0, sizes - side)
    return np.stack([*offset, side, side], axis=1).astype(np.int64)


@numba.njit(cache=True, nogil=True)
def argument_of(operation, level, sign):
    """timm's argument of an operation at a level, 0 to 10; sign is 1 or -1."""
    share = level / 10
    if operation == randaugment.ROTATE:
        return sign * (share * 30)
    if operation == augment.POSTERIZE:
        return 4.0 - int(share * 4)  # bits
    if operation == augment.SOLARIZE:
        return 256.0 - min(256, int(share * 256))  # the value from which on it inverts
    if operation == augment.SOLARIZE_ADD:
        return float(min(128, int(share * 110)))
    if augment.COLOR <= operation <= augment.SHARPNESS:
        return max(0.1, 1 + sign * (share * 0.9))
    if operation == randaugment.SHEAR_X or operation == randaugment.SHEAR_Y:
        return sign * (share * 0.3)
    if operation == randaugment.TRANSLATE_X or operation == randaugment.TRANSLATE_Y:
        return sign * (share * 0.45)  # of the side
    return 0.0


@numba.njit(cache=True, nogil=True)
def draw_rand_augment(seeds, layers, magnitude, mstd, probability, maximum):
    """Operations (B, layers), NOTHING where none is applied, and their arguments (B, layers)."""
    operations = np.full((len(seeds), layers), augment.NOTHING)
    arguments = np.zeros((len(seeds), layers))
    for k in range(len(seeds)):
        np.random.seed(seeds[k])
        for layer in range(layers):
            operation = np.random.randint(0, NUM_OPERATIONS)
            if np.random.random() > probability:
                continue
            if mstd == np.inf:
                level = np.random.uniform(0.0, magnitude)
            else:
                level = np.random.normal(magnitude, mstd)
            sign = -1.0 if np.random.random() > 0.5 else 1.0
            operations[k, layer] = operation
            arguments[k, layer] = argument_of(operation, max(0.0, min(level, maximum)), sign)
    return operations, arguments


@numba.njit(cache=True, nogil=True)
def draw_color_jitter(seeds, strength):
    """torchvision's ColorJitter(strength, strength, strength): as draw_rand_augment's (B, 3)."""
    operations = np.empty((len(seeds), len(JITTER)), np.int64)
    arguments = np.empty((len(seeds), len(JITTER)))
    for k in range(len(seeds)):
        np.random.seed(seeds[k])
        operations[k] = np.random.permutation(JITTER)
        for layer in range(len(JITTER)):
            arguments[k, layer] = np.random.uniform(max(0.0, 1 - strength), 1 + strength)
    return operations, arguments


class Augmentation:
    """Change the pixels of crops: by RandAugment or, without it, by colour jitter."""

    def __init__(
        self, rand_augment: str | None, color_jitter: float, fill: tuple[int, ...]
    ) -> None:
        self.rand_augment = RandAugment.parse(rand_augment) if rand_augment else None
        self.color_jitter = float(color_jitter)
        self.fill = np.array(fill, np.uint8)

    def draw(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Operations and arguments (B, layers) of images with such seeds (B,)."""
        seeds = seeds.astype(np.uint32) ^ SALT  # crops are drawn from the seeds themselves
        if self.rand_augment:
            return draw_rand_augment(seeds, *self.rand_augment)
        return draw_color_jitter(seeds, self.color_jitter)

    def __call__(self, images: np.ndarray, seeds: np.ndarray) -> None:
        """Change images (B, H, W, 3), uint8."""
        if self.rand_augment or self.color_jitter:
            operations, arguments = self.draw(seeds)
            height, width = images.shape[1:3]
            affines = [
                [source_of(*step, width, height) for step in zip(*steps, strict=True)]
                for steps in zip(operations.tolist(), arguments.tolist(), strict=True)
            ]
            augment.augment_batch(images, operations, arguments, np.array(affines), self.fill)

    def warps(self, seeds: np.ndarray) -> np.ndarray:
        """Where the pixels of each image come from (B, 2, 3): evit.data.randaugment.warp_of."""
        return np.stack([warp_of(*drawn) for drawn in zip(*self.draw(seeds), strict=True)])
