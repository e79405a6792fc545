"""FFCV decoders that read, crop, resize and flip a batch in one compiled, parallel loop.

An FFCV decoder is given nothing but sample numbers, and numba's random numbers depend on the
number of threads. So the order of an epoch carries the randomness: every entry is `seed << 32 |
sample`, and a crop is a pure function of its entry.

The compiled functions live at module level, where numba can keep them on disk: only the first run
on a machine waits for the compiler.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numba
import numpy as np

from evit.data.ffcv._ffcv import (
    AllocationQuery,
    IntDecoder,
    NDArrayDecoder,
    SimpleRGBImageDecoder,
    State,
    get_random_crop,
)
from evit.data.ffcv.draw import Augmentation
from evit.data.ffcv.format import ALLOCATION, CRC, DamagedSample
from evit.data.ffcv.pixels import crop_batch

_get_random_crop = numba.njit(get_random_crop)  # torchvision's RandomResizedCrop.get_params

SAMPLE_BITS = np.uint64(32)
SAMPLE_MASK = np.uint64(2**32 - 1)


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
def _read_pieces(file, starts, output):
    """Fill output (B, bytes) with what begins at starts (B,)."""
    for k in range(len(starts)):
        output[k] = file[starts[k] : starts[k] + np.uint64(output.shape[1])]


class _CropDecoder(SimpleRGBImageDecoder):
    """Decode to (img_size, img_size, 3); a subclass says which part of each image.

    `shrinks`: whether large crops may be decoded at a fraction of their size, which is faster and
    changes pixels less than another resampling filter does.
    """

    shrinks: bool
    augmentation: Augmentation | None = None

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = img_size

    def crops(
        self, heights: np.ndarray, widths: np.ndarray, seeds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def crops_of(
        self, entries: np.ndarray, metadata: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sizes (B, 2) of height and width, boxes (B, 4) and flips (B,) of an order's entries."""
        fields = metadata[entries & SAMPLE_MASK]
        heights, widths = (fields[side].astype(np.int64) for side in ("height", "width"))
        boxes, flips = self.crops(heights, widths, entries >> SAMPLE_BITS)
        return np.stack([heights, widths], 1), boxes, flips

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (self.img_size, self.img_size, 3), np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        def decode(
            entries: np.ndarray, output: np.ndarray, metadata: np.ndarray, storage: Any
        ) -> np.ndarray:
            samples = entries & SAMPLE_MASK
            _, boxes, flips = self.crops_of(entries, metadata)
            status = crop_batch(*(samples, boxes, flips, self.shrinks, output, metadata, *storage))
            if status.any():
                raise DamagedSample(f"the JPEG of sample {samples[status.argmin()]} is damaged")
            if self.augmentation:
                self.augmentation(output, entries >> SAMPLE_BITS)
            return output

        return decode


class RandomResizedCropFlip(_CropDecoder):
    """torchvision's RandomResizedCrop, then a horizontal flip with probability `flip`, then the
    augmentation of its pixels.

    `scale` bounds the area of the crop relative to the image, `ratio` its width / height.
    """

    shrinks = True

    def __init__(
        self,
        img_size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: float,
        augmentation: Augmentation,
    ) -> None:
        super().__init__(img_size)
        self.scale, self.ratio, self.flip = np.array(scale, float), np.array(ratio, float), flip
        self.augmentation = augmentation

    def crops(
        self, heights: np.ndarray, widths: np.ndarray, seeds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        seeds = seeds.astype(np.uint32)
        return random_crops(heights, widths, seeds, self.scale, self.ratio, float(self.flip))


class CenterCrop(_CropDecoder):
    """Resize the short side to img_size / crop_pct and cut out the centre, cutting first."""

    shrinks = False

    def __init__(self, img_size: int, crop_pct: float) -> None:
        super().__init__(img_size)
        self.crop_pct = crop_pct

    def crops(
        self, heights: np.ndarray, widths: np.ndarray, seeds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        boxes = center_crops(heights, widths, self.img_size, self.crop_pct)
        return boxes, np.zeros(len(boxes), np.bool_)


class CropRecord(SimpleRGBImageDecoder):
    """Which part of each image another decoder shows: (B, 5), x0, y0, x1, y1 as shares of the
    image's width and height, and 1 where it is mirrored."""

    def __init__(self, decoder: _CropDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        dtype = np.dtype("f4")
        state = replace(previous_state, jit_mode=True, shape=(5,), dtype=dtype)
        return state, AllocationQuery((5,), dtype)

    def generate_code(self) -> Callable:
        def decode(
            entries: np.ndarray, output: np.ndarray, metadata: np.ndarray, storage: Any
        ) -> np.ndarray:
            sizes, boxes, flips = self.decoder.crops_of(entries, metadata)
            output[:, 1::-1] = boxes[:, :2] / sizes
            output[:, 3:1:-1] = (boxes[:, :2] + boxes[:, 2:]) / sizes
            output[:, 4] = flips
            return output

        return decode


class WarpRecord(SimpleRGBImageDecoder):
    """Where the pixels of each crop lie after RandAugment's geometric operations: (B, 2, 3), the
    affine maps from the unit square that is shown to that of the crop."""

    def __init__(self, augmentation: Augmentation) -> None:
        super().__init__()
        self.augmentation = augmentation

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        dtype = np.dtype("f4")
        state = replace(previous_state, jit_mode=True, shape=(2, 3), dtype=dtype)
        return state, AllocationQuery((2, 3), dtype)

    def generate_code(self) -> Callable:
        def decode(
            entries: np.ndarray, output: np.ndarray, metadata: np.ndarray, storage: Any
        ) -> np.ndarray:
            output[:] = self.augmentation.warps(entries >> SAMPLE_BITS)
            return output

        return decode


class LabelMapDecoder(NDArrayDecoder):
    """Label maps (B, 2, 5, H, W), float16."""

    def generate_code(self) -> Callable:
        def decode(
            entries: np.ndarray, output: np.ndarray, metadata: np.ndarray, storage: Any
        ) -> np.ndarray:
            samples, (file, ptrs, _) = entries & SAMPLE_MASK, storage
            pieces = output.view(np.uint8).reshape(len(output), -1)
            _read_pieces(file, metadata[samples], pieces)
            table = len(file) - len(ptrs) * ALLOCATION.itemsize
            crcs = file[table - len(ptrs) * CRC.itemsize : table].view(CRC)
            for sample, piece in zip(samples.tolist(), pieces, strict=True):
                if zlib.crc32(piece.data) != crcs[2 * sample + 1]:
                    raise DamagedSample(f"the label map of sample {sample} is damaged")
            return output

        return decode


class LabelDecoder(IntDecoder):
    """Labels (B,), int64."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        state = replace(previous_state, jit_mode=True, shape=(), dtype=self.dtype)
        return state, AllocationQuery((), self.dtype)

    def generate_code(self) -> Callable:
        def decode(
            entries: np.ndarray, output: np.ndarray, metadata: np.ndarray, storage: Any
        ) -> np.ndarray:
            output[:] = metadata[entries & SAMPLE_MASK]
            return output

        return decode
