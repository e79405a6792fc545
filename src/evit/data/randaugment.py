"""RandAugment (arXiv 1909.13719) as timm configures and draws it: what both backends share."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

# The operations of timm's "inc1", whose severity increases with the magnitude, in timm's order.
NUM_OPERATIONS = 15
AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD = range(7)
COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(7, 15)
SYNTAX = re.compile(r"rand(-(m\d+|n\d+|p\d*\.?\d+|mstd\d*\.?\d+|mmax\d+|inc1))*")


class RandAugment(NamedTuple):
    """`layers` operations are drawn for an image, each applied with `probability`, at a magnitude
    from N(magnitude, mstd), or from 0 to magnitude if mstd is infinite, within 0 to `maximum`."""

    layers: int
    magnitude: float
    mstd: float
    probability: float
    maximum: float

    @classmethod
    def parse(cls, config: str) -> RandAugment:
        """Parsed form of timm's syntax, such as rand-m9-mstd0.5-inc1."""
        if not SYNTAX.fullmatch(config) or "inc1" not in config.split("-"):
            raise ValueError(
                f"recipe.rand_augment={config!r}: write it as timm does, rand-m9-mstd0.5-inc1, "
                f"with m, n, p, mstd and mmax as you like, and with inc1"
            )
        found: Any = rand_augment_transform(config, {})
        op = found.ops[0]
        numbers = op.magnitude, op.magnitude_std, op.prob, op.magnitude_max or 10
        return cls(found.num_layers, *map(float, numbers))  # of one type: it is compiled once


def fill_color(mean: Sequence[float]) -> tuple[int, ...]:
    """What timm puts where a geometric operation leaves nothing: the mean of the normalisation."""
    return tuple(min(255, round(255 * value)) for value in mean)


def source_of(operation: int, argument: float, width: float, height: float) -> Any:
    """The affine map (a, b, c, d, e, f) from a pixel to where it comes from, as PIL wants it:
    x, y -> a x + b y + c, d x + e y + f. The identity if the operation moves nothing."""
    if operation == ROTATE:
        angle = -math.radians(argument % 360.0)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2
        return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y
    values = {
        SHEAR_X: (argument, 0.0, 0.0, 0.0),
        TRANSLATE_X: (0.0, argument * width, 0.0, 0.0),
        SHEAR_Y: (0.0, 0.0, argument, 0.0),
        TRANSLATE_Y: (0.0, 0.0, 0.0, argument * height),
    }
    b, c, d, f = values.get(operation, (0.0,) * 4)
    return 1.0, b, c, d, 1.0, f


def warp_of(operations: Sequence[int], arguments: Sequence[float]) -> np.ndarray:
    """The affine map (2, 3) from the unit square of a square image to that of the image before
    these operations, in the order in which they were applied."""
    warp = np.eye(3)
    for operation, argument in zip(operations, arguments, strict=True):
        step = np.array(source_of(operation, argument, 1.0, 1.0)).reshape(2, 3)
        warp = warp @ np.vstack([step, [0, 0, 1]])
    return warp[:2].astype(np.float32)


class PILRandAugment:
    """timm's RandAugment of PIL images: an image gives an image, and the map of warp_of.

    Draws from the global generators of `random` and numpy. Bicubic, as in DeiT's training.
    """

    def __init__(self, config: str, fill: tuple[int, ...]):
        options = dict(img_mean=fill, interpolation=Image.Resampling.BICUBIC)
        self.transform: Any = rand_augment_transform(config, options)
        self.applied: list[tuple[int, float]] = []
        for operation, op in enumerate(self.transform.ops):
            op.aug_fn = partial(self._apply, operation, op.aug_fn)

    def _apply(self, operation: int, function: Any, image: Any, *arguments: Any, **more: Any):
        self.applied.append((operation, arguments[0] if arguments else 0.0))
        if operation == POSTERIZE and arguments[0] < 1:
            return Image.new(image.mode, image.size)  # Pillow 13 refuses 0 bits, earlier: black
        return function(image, *arguments, **more)

    def __call__(self, image: Image.Image) -> tuple[Image.Image, np.ndarray]:
        self.applied = []
        image = self.transform(image)
        return image, warp_of([op for op, _ in self.applied], [value for _, value in self.applied])
