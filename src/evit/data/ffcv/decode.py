"""FFCV decoders that read, crop, resize and flip a batch in one compiled, parallel loop.

FFCV gives a decoder nothing but sample numbers, so the order of an epoch carries the randomness:
every entry is `seed << 32 | sample`, and a crop is a pure function of its entry. Of a JPEG no more
is decoded than the crop shows, and in training at 1/2, 1/4 or 1/8 of the size where that leaves
twice the pixels that are wanted on either side. The rest is a mean over areas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numba
import numpy as np

from evit.data.ffcv import augment
from evit.data.ffcv._ffcv import AllocationQuery, Operation, State, get_random_crop
from evit.data.ffcv.format import JPEG, DamagedSample, Shape
from evit.data.ffcv.jpeg import jpeg_crop
from evit.data.randaugment import RandAugment, source_of, warp_of
from evit.recipe import Recipe

SAMPLE_BITS = np.uint64(32)
SAMPLE_MASK = np.uint64(2**32 - 1)
SALT = np.uint32(0x9E3779B9)
RATIO = np.array([3 / 4, 4 / 3])  # width / height of random crops
_BESIDE = 8 + 2 + 32  # columns that jpeg_crop may add to a crop: margins and the widest MCU
_ONE, _TWO, _THREE = np.uintp(1), np.uintp(2), np.uintp(3)  # numba checks signed indices for < 0

_get_random_crop = numba.njit(get_random_crop)  # torchvision's RandomResizedCrop.get_params

jit = numba.njit(cache=True, nogil=True)


@jit
def _decode_jpeg(data, height, width, shrink, top, bottom, left, right):
    """Rows top to bottom and columns left to right of the shrunk image, the column in which they
    begin, and a status that is not 0 where libjpeg-turbo failed or had to guess."""
    pixels = np.empty((bottom - top, right - left + _BESIDE, 3), np.uint8)
    found = np.zeros(1, np.uint32)
    status = jpeg_crop(
        *(data.ctypes.data, data.size, width, height, shrink, top, bottom, left, right),
        *(pixels.ctypes.data, pixels.shape[1] * 3, found.ctypes.data),
    )
    return pixels, np.int64(found[0]), status


@jit
def _areas(start, length, scale, size):
    """What `size` equal parts of start to start + length cover, in pixels `scale` wide: the first
    pixel of each part, and the shares (size, n) that it and the next ones have in the part."""
    pixel = scale * size  # in units of 1 / size, everything is whole
    firsts = np.empty(size, np.int64)
    shares = np.zeros((size, -(-length // pixel) + 1), np.float32)
    for k in range(size):
        begin = start * size + k * length
        end = begin + length
        firsts[k] = begin // pixel
        for n in range(shares.shape[1]):
            edge = (firsts[k] + n) * pixel
            shares[k, n] = max(0, min(end, edge + pixel) - max(begin, edge)) / length
    return firsts, shares


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _resize(pixels, rows, row_shares, columns, column_shares, mirror, output):
    """Fill output (H, W, 3) with sums of the pixels that _areas names."""
    taps = np.uintp(column_shares.shape[1])
    begin = 3 * columns[0]
    end = min(3 * (columns[-1] + column_shares.shape[1]), 3 * pixels.shape[1])
    length = np.uintp(end - begin)
    line = np.zeros(length + _THREE * taps, np.float32)  # shares of 0 reach beyond the edge
    flat = pixels.reshape(pixels.shape[0], 3 * pixels.shape[1])
    for y in range(output.shape[0]):
        share, source = row_shares[y, 0], flat[rows[y], begin:end]
        for i in range(length):
            line[i] = share * np.float32(source[i])
        for n in range(1, row_shares.shape[1]):
            share = row_shares[y, n]
            if share > 0:
                source = flat[rows[y] + n, begin:end]
                for i in range(length):
                    line[i] += share * np.float32(source[i])
        for x in range(output.shape[1]):
            at = np.uintp(3 * columns[x] - begin)
            red = green = blue = np.float32(0.5)  # to the nearest whole number
            for n in range(taps):
                share = column_shares[x, n]
                red += share * line[at]
                green += share * line[at + _ONE]
                blue += share * line[at + _TWO]
                at += _THREE
            pixel = output[y, output.shape[1] - 1 - x if mirror else x]
            pixel[0], pixel[1], pixel[2] = np.uint8(red), np.uint8(green), np.uint8(blue)


@jit
def crop_image(data, is_jpeg, size, box, flip, shrinks, output):
    """Fill output (H, W, 3) with the box (top, left, height, width) of an image whose size is
    (height, width), and return a status that is not 0 for a damaged JPEG.

    `shrinks`: whether a JPEG may be decoded at a fraction of its size, the least that leaves twice
    the output's pixels.
    """
    top, left, height, width = box
    enough = min(height // (2 * output.shape[0]), width // (2 * output.shape[1]))
    shrink = 1
    while is_jpeg and shrinks and shrink < 8 and 2 * shrink <= enough:
        shrink *= 2
    rows, row_shares = _areas(top, height, shrink, output.shape[0])
    columns, column_shares = _areas(left, width, shrink, output.shape[1])
    status = 0
    if is_jpeg:
        first_row, end_row = top // shrink, -(-(top + height) // shrink)
        first_column, end_column = left // shrink, -(-(left + width) // shrink)
        pixels, found, status = _decode_jpeg(
            *(data, size[0], size[1], shrink, first_row, end_row, first_column, end_column)
        )
        rows -= first_row
        columns += found - first_column
    else:
        pixels = data.reshape((size[0], size[1], 3))
    if status == 0:
        _resize(pixels, rows, row_shares, columns, column_shares, flip, output)
    return status


@numba.njit(cache=True, nogil=True, parallel=True)
def crop_batch(samples, boxes, flips, shrinks, output, metadata, file, ptrs, sizes):
    """Fill output (B, H, W, 3) and return the statuses (B,) of crop_image."""
    status = np.zeros(len(samples), np.int32)
    for k in numba.prange(len(samples)):
        field = metadata[samples[k]]
        start = field["data_ptr"]
        data = file[start : start + sizes[np.searchsorted(ptrs, start)]]
        size = np.int64(field["height"]), np.int64(field["width"])
        is_jpeg = field["mode"] == JPEG
        status[k] = crop_image(data, is_jpeg, size, boxes[k], flips[k], shrinks, output[k])
    return status


def decode_jpeg(data: bytes, height: int, width: int) -> np.ndarray | None:
    """The pixels (H, W, 3) that a crop is taken from, None if libjpeg-turbo fails or guesses."""
    whole = 0, height, 0, width
    pixels, _, status = _decode_jpeg(np.frombuffer(data, np.uint8), height, width, 1, *whole)
    return None if status else pixels[:, :width]


@jit
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


class Decoder(Operation):
    """Arrays (B, *shape) that fill(entries, output, metadata, storage) fills and returns."""

    def __init__(self, fill: Callable[..., np.ndarray], shape: Sequence[int], dtype: str) -> None:
        super().__init__()
        self.fill, self.shape, self.dtype = fill, tuple(shape), np.dtype(dtype)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        state = replace(previous_state, jit_mode=True, shape=self.shape, dtype=self.dtype)
        return state, AllocationQuery(self.shape, self.dtype)

    def generate_code(self) -> Callable:
        return self.fill


class Crops:
    """Crops of images, and what is said of them, each a decoder's `fill`.

    Evaluation resizes the short side to img_size / crop_pct and cuts out the centre, cutting first.
    Training takes torchvision's RandomResizedCrop of crop_scale times the area, a horizontal flip
    with probability flip, and then RandAugment.
    """

    def __init__(self, img_size: int, recipe: Recipe, train: bool, fill: tuple[int, ...]) -> None:
        self.img_size, self.recipe, self.train = img_size, recipe, train
        # Not uint8: FFCV changes numba's own type of such arrays.
        self.fill, name = np.array(fill, np.int64), recipe.rand_augment
        self.rand_augment: Any = RandAugment.parse(name) if train and name else None

    def crops(self, entries: np.ndarray, metadata: np.ndarray) -> Any:
        """Sizes (B, 2) of height and width, boxes (B, 4) of top, left, height, width, and flips
        (B,) of an order's entries."""
        fields = metadata[entries & SAMPLE_MASK]
        sizes = heights, widths = [fields[side].astype(np.int64) for side in ("height", "width")]
        if self.train:
            seeds, scale = (entries >> SAMPLE_BITS).astype(np.uint32), self.recipe.crop_scale
            parameters = np.array(scale, float), RATIO, float(self.recipe.flip)
            return np.stack(sizes, 1), *random_crops(heights, widths, seeds, *parameters)
        boxes = center_crops(heights, widths, self.img_size, self.recipe.crop_pct)
        return np.stack(sizes, 1), boxes, np.zeros(len(boxes), np.bool_)

    def drawn(self, entries: np.ndarray) -> Any:
        """RandAugment's operations and arguments (B, layers)."""
        seeds = (entries >> SAMPLE_BITS).astype(
            np.uint32
        ) ^ SALT  # crops: from the seeds themselves
        return augment.draw(seeds, *self.rand_augment)

    def images(self, entries: Any, output: np.ndarray, metadata: Any, storage: Any) -> np.ndarray:
        """uint8 (B, H, W, 3)."""
        samples, (_, boxes, flips) = entries & SAMPLE_MASK, self.crops(entries, metadata)
        status = crop_batch(samples, boxes, flips, self.train, output, metadata, *storage)
        if status.any():
            raise DamagedSample(f"the JPEG of sample {samples[status.argmin()]} is damaged")
        if self.rand_augment:
            operations, arguments = self.drawn(entries)
            steps = zip(operations.ravel().tolist(), arguments.ravel().tolist(), strict=True)
            affines = np.array([source_of(*step, self.img_size, self.img_size) for step in steps])
            affines = affines.reshape(*operations.shape, 6)
            augment.augment_batch(output, operations, arguments, affines, self.fill)
        return output

    def records(self, entries: Any, output: np.ndarray, metadata: Any, storage: Any) -> np.ndarray:
        """The crops (B, 5): x0, y0, x1, y1 as shares of the image's width and height, and 1 where
        it is mirrored."""
        sizes, boxes, flips = self.crops(entries, metadata)
        starts, ends = boxes[:, :2] / sizes, (boxes[:, :2] + boxes[:, 2:]) / sizes
        output[:] = np.column_stack([starts[:, ::-1], ends[:, ::-1], flips])
        return output

    def warps(self, entries: Any, output: np.ndarray, metadata: Any, storage: Any) -> np.ndarray:
        """The affine maps (B, 2, 3) of RandAugment, from the unit square shown to the crop's."""
        output[:] = [warp_of(*steps) for steps in zip(*self.drawn(entries), strict=True)]
        return output


def label_maps(shape: Shape, num_classes: int) -> Decoder:
    """Label maps (B, 2, 5, H, W), float16; a damaged one is an error."""

    def fill(entries: Any, output: np.ndarray, metadata: Any, storage: Any) -> np.ndarray:
        samples = entries & SAMPLE_MASK
        for start, rest in zip(metadata[samples], output, strict=True):
            rest[:] = storage[0][start:][: rest.nbytes].view("<f2").reshape(rest.shape)
        logits, ids = output[:, 0], output[:, 1]
        good = np.isfinite(logits) & (ids >= 0) & (ids < num_classes)
        if not (good := good.all((1, 2, 3))).all():
            raise DamagedSample(f"the label map of sample {samples[good.argmin()]} is damaged")
        return output

    return Decoder(fill, (2, 5, *shape), "f2")


def labels(entries: Any, output: np.ndarray, metadata: Any, storage: Any) -> np.ndarray:
    """Labels (B,), int64."""
    output[:] = metadata[entries & SAMPLE_MASK]
    return output
