"""Decode (of a JPEG no more than is shown), crop, resize (a mean over areas) and flip a batch."""

import ctypes
import os
import platform
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba import types

from evit.data.ffcv import JPEG, get_random_crop

SOURCE = Path(__file__).with_name("jpeg_crop.c")
RATIO = np.array([3 / 4, 4 / 3])  # width / height of random crops
_BESIDE = 8 + 2 + 32  # columns that jpeg_crop may add to a crop: margins and the widest MCU
_ONE, _TWO, _THREE = np.uintp(1), np.uintp(2), np.uintp(3)  # numba checks signed indices for < 0
_get_random_crop = numba.njit(get_random_crop)  # torchvision's RandomResizedCrop.get_params
jit = numba.njit(cache=True, nogil=True)


def _library() -> ctypes.CDLL:
    """jpeg_crop.c, compiled where that has not been done yet."""
    key = f"{platform.machine()}-{zlib.crc32(SOURCE.read_bytes()):08x}"
    library = Path(f"~/.cache/evit-lab/jpeg_crop-{key}.so").expanduser()
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # not there yet, or made on a machine with another libjpeg
        library.parent.mkdir(parents=True, exist_ok=True)
    options: Any = dict(check=True, capture_output=True, text=True)
    try:
        found = subprocess.run(["pkg-config", "--cflags", "--libs", "libjpeg"], **options)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = f"{folder}/{library.name}"
            command = [*os.environ.get("CC", "cc").split(), "-O2", "-shared", "-fPIC", str(SOURCE)]
            subprocess.run([*command, "-o", made, *found.stdout.split()], **options)
            os.replace(made, library)  # at once: other processes may be about to do the same
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        way = "`make setup`, or install g++ pkg-config libjpeg-dev (libjpeg-turbo's)"
        raise ImportError(f"jpeg_crop.c cannot be compiled ({reason}): {way}") from error
    return ctypes.CDLL(str(library))


# By name and not by ctypes, because numba does not keep functions that hold an address on disk.
_address = ctypes.cast(_library().evit_jpeg_crop, ctypes.c_void_p).value
llvmlite.binding.add_symbol("evit_jpeg_crop", _address)
_data = types.uintp, types.ulong  # a pointer, and bytes of all or of a row
_signature = types.int32(*_data, *(types.uint32,) * 7, *_data, types.uintp)
_jpeg_crop = types.ExternalFunction("evit_jpeg_crop", _signature)


@jit
def _decode_jpeg(data, height, width, shrink, top, bottom, left, right):
    """Rows top to bottom and columns left to right of the shrunk image; in which column of them
    `left` is; 0, or -1 for a damaged JPEG."""
    pixels = np.empty((bottom - top, right - left + _BESIDE, 3), np.uint8)
    found = np.zeros(1, np.uint32)
    status = _jpeg_crop(
        *(data.ctypes.data, data.size, width, height, shrink, top, bottom, left, right),
        *(pixels.ctypes.data, pixels.shape[1] * 3, found.ctypes.data),
    )
    return pixels, np.int64(found[0]), status


@jit
def _areas(start, length, scale, size):
    """Cut start to start + length into `size` equal parts, over pixels that are `scale` wide: the
    first pixel of each part, and the shares (size, n) that it and the next have in it."""
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
    """Fill output (H, W, 3) with means over areas, whose pixels and shares are those of _areas."""
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
    """Fill output (H, W, 3) with the box (top, left, height, width) of an image of size (height,
    width); not 0 for a damaged JPEG. If it `shrinks`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its
    size where that leaves twice the output's pixels."""
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
def crop_batch(file, images, sizes, boxes, flips, shrinks, output):
    """Fill output (B, H, W, 3) from FFCV's metadata of images (B,) and their bytes, sizes (B,)."""
    status = np.zeros(len(images), np.int32)
    for k in numba.prange(len(images)):
        image = images[k]
        data = file[image["data_ptr"] : image["data_ptr"] + sizes[k]]
        size = np.int64(image["height"]), np.int64(image["width"])
        is_jpeg = image["mode"] == JPEG
        status[k] = crop_image(data, is_jpeg, size, boxes[k], flips[k], shrinks, output[k])
    return status


def decode_jpeg(data: bytes, height: int, width: int) -> np.ndarray | None:
    """Decode a whole JPEG to (H, W, 3), as crops see it; None if libjpeg-turbo fails or guesses."""
    whole = 0, height, 0, width
    pixels, _, status = _decode_jpeg(np.frombuffer(data, np.uint8), height, width, 1, *whole)
    return None if status else pixels[:, :width]


@jit
def random_crops(heights, widths, seeds, scale, ratio, flip):
    """Draw boxes (B, 4), top, left, height, width, and flips (B,), each from its own seed."""
    boxes, flips = np.empty((len(seeds), 4), np.int64), np.empty(len(seeds), np.bool_)
    for k in range(len(seeds)):
        np.random.seed(seeds[k])
        boxes[k] = _get_random_crop(heights[k], widths[k], scale, ratio)
        flips[k] = np.random.random() < flip
    return boxes, flips


def center_crops(heights: Any, widths: Any, img_size: int, crop_pct: float) -> np.ndarray:
    """Boxes (B, 4), top, left, height, width, that torchvision's Resize(int(img_size / crop_pct))
    and CenterCrop(img_size) leave of each image, to the nearest pixel."""
    sizes = np.stack([heights, widths]).astype(np.int64)
    short, resized_short = sizes.min(0), int(img_size / crop_pct)
    resized = resized_short * sizes // short
    side = np.clip(np.rint(img_size * short / resized_short), 1, short)
    offset = np.rint(np.rint((resized - img_size) / 2) * sizes / resized)
    offset = np.clip(offset, 0, sizes - side)
    return np.stack([*offset, side, side], axis=1).astype(np.int64)
