"""The operations of RandAugment and colour jitter, in functions that numba keeps on disk.

Each gives the pixels that Pillow gives when timm asks it, to the bit. They are all in this file, as
numba looks at no other to tell whether what it has kept is still valid.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from evit.data.randaugment import ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y

AUTO_CONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD = 0, 1, 2, 4, 5, 6
COLOR, CONTRAST, BRIGHTNESS, SHARPNESS = 7, 8, 9, 10
NOTHING = -1
CHUNK = 32


@numba.njit(cache=True, nogil=True)
def _blend(low, high, factor):
    """low + factor * (high - low), cut off as PIL does; all float32."""
    value = low + factor * (high - low)
    value = value if value > np.float32(0) else np.float32(0)
    return np.uint8(value if value < np.float32(255) else np.float32(255))


@numba.njit(cache=True, nogil=True)
def _gray(pixel):
    return (pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16


@numba.njit(cache=True, nogil=True)
def _auto_contrast(counts, table):
    present = np.flatnonzero(counts)
    low, high = present[0], present[-1]
    if high > low:
        scale = 255.0 / (high - low)
        offset = -low * scale
        for i in range(256):
            table[i] = max(0, min(255, int(i * scale + offset)))


@numba.njit(cache=True, nogil=True)
def _equalize(counts, table):
    present = np.flatnonzero(counts)
    step = (counts.sum() - counts[present[-1]]) // 255
    if step > 0:
        n = step // 2
        for i in range(256):
            table[i] = min(255, n // step)
            n += counts[i]


@numba.njit(cache=True, nogil=True)
def _tables(pixels, operation, argument):
    """The value (3, 256) that takes the place of each, by the operations that look at no place."""
    tables = np.empty((3, 256), np.uint8)
    tables[:] = np.arange(256)
    if operation == AUTO_CONTRAST or operation == EQUALIZE:
        counts = np.zeros((3, 256), np.int64)
        for i in range(len(pixels)):
            for c in range(3):
                counts[c, pixels[i, c]] += 1
        for c in range(3):
            if operation == AUTO_CONTRAST:
                _auto_contrast(counts[c], tables[c])
            else:
                _equalize(counts[c], tables[c])
        return tables
    gray = np.float32(0)
    if operation == CONTRAST:
        total = 0
        for i in range(len(pixels)):
            total += _gray(pixels[i])
        gray = np.float32(int(total / len(pixels) + 0.5))
    number = int(argument)
    for i in range(256):
        value = i
        if operation == INVERT or operation == SOLARIZE and i >= number:
            value = 255 - i
        elif operation == SOLARIZE_ADD and i < 128:
            value = min(255, i + number)
        elif operation == POSTERIZE:  # of no bits: black, as Pillow gave it before version 13
            value = i & -(1 << (8 - number)) if number > 0 else 0
        elif operation == CONTRAST or operation == BRIGHTNESS:
            value = _blend(gray, np.float32(i), np.float32(argument))
        tables[:, i] = value
    return tables


@numba.njit(cache=True, nogil=True)
def _color(image, factor):
    """Away from gray."""
    height, width, _ = image.shape
    gray, values = np.empty(3 * width, np.float32), image.reshape(height, 3 * width)
    for y in range(height):
        for x in range(width):
            gray[3 * x] = gray[3 * x + 1] = gray[3 * x + 2] = np.float32(_gray(image[y, x]))
        for i in range(3 * width):
            values[y, i] = _blend(gray[i], np.float32(values[y, i]), factor)


@numba.njit(cache=True, nogil=True)
def _sharpness(image, factor):
    """Away from PIL's SMOOTH, whose border stays as it is."""
    height, length = image.shape[0], 3 * image.shape[1]
    source = image.copy().reshape(height, length)
    output = image.reshape(height, length)
    share, half, four = np.float32(1 / 13), np.float32(0.5), np.float32(4)
    total = np.empty(length, np.float32)
    for y in range(1, height - 1):
        above, row, below = source[y - 1], source[y], source[y + 1]
        for i in range(length):
            total[i] = np.float32(above[i]) + np.float32(below[i]) + np.float32(row[i])
        left, middle, right = total[:-6], total[3:-3], total[6:]
        centre, inner = row[3:-3], output[y, 3:-3]
        for i in range(len(inner)):
            value = np.float32(centre[i])
            smooth = (left[i] + middle[i] + right[i] + four * value) * share + half
            inner[i] = _blend(np.float32(np.uint8(smooth)), value, factor)


@numba.njit(cache=True, nogil=True)
def _cubic(v1, v2, v3, v4, d):
    """PIL's, in its order of rounding."""
    return v2 + d * ((-v1 + v3) + d * ((2 * (v1 - v2) + v3 - v4) + d * (-v1 + v2 - v3 + v4)))


@numba.njit(cache=True, nogil=True)
def _cut(value):
    value = value if value > 0.0 else 0.0
    return np.uint8(value if value < 255.0 else 255.0)


@numba.njit(cache=True, nogil=True)
def _between(source, y, xs, c, d):
    v1, v2 = float(source[y, xs[0], c]), float(source[y, xs[1], c])
    return _cubic(v1, v2, float(source[y, xs[2], c]), float(source[y, xs[3], c]), d)


@numba.njit(cache=True, nogil=True)
def _interpolate(source, x, y, image, row, column):
    """The bicubic pixel at a place inside the source (H, W, 3) to one of the image."""
    height, width, _ = source.shape
    x, y = x - 0.5, y - 0.5
    left, top = int(math.floor(x)), int(math.floor(y))
    dx, dy = x - left, y - top
    xs = max(left - 1, 0), max(left, 0), min(left + 1, width - 1), min(left + 2, width - 1)
    for c in range(3):
        v1 = _between(source, max(top - 1, 0), xs, c, dx)
        v2 = _between(source, max(top, 0), xs, c, dx)
        v3 = _between(source, min(top + 1, height - 1), xs, c, dx)
        v4 = _between(source, min(top + 2, height - 1), xs, c, dx)
        image[row, column, c] = _cut(_cubic(v1, v2, v3, v4, dy))


@numba.njit(cache=True, nogil=True)
def _shift_rows(source, image, slope, offset, fill):
    """Fill image with what lies slope * y + offset to the right in the source, both (H, W, 3)."""
    height, width, _ = source.shape
    rows, output = source.reshape(height, 3 * width), image.reshape(height, 3 * width)
    line, distances = np.empty(3 * width), np.empty(3 * width)
    for y in range(height):
        for i in range(3 * width):
            line[i] = rows[y, i]
        shift = slope * (y + 0.5)
        whole = int(math.floor(shift + offset))
        # Columns whose four neighbours are all in the row.
        begin = min(max(2 - whole, 0), width)
        end = max(min(width - 3 - whole, width), begin)
        for x in range(begin, end if slope != 0 or y == 0 else begin):
            # As PIL rounds it, which depends on x.
            distance = (x + 0.5 + shift + offset) - 0.5 - (x + whole)
            for c in range(3):
                distances[3 * (x - begin) + c] = distance
        first, last = 3 * (begin + whole), 3 * (end + whole)
        inner = output[y, 3 * begin : 3 * end]
        v1, v2 = line[first - 3 : last - 3], line[first:last]
        v3, v4 = line[first + 3 : last + 3], line[first + 6 : last + 6]
        for i in range(len(inner)):
            inner[i] = _cut(_cubic(v1[i], v2[i], v3[i], v4[i], distances[i]))
        for k in range(width - (end - begin)):
            x = k if k < begin else k + end - begin
            from_x = x + 0.5 + shift + offset
            if 0 <= from_x < width:
                _interpolate(source, from_x, y + 0.5, image, y, x)
            else:
                for c in range(3):
                    output[y, 3 * x + c] = fill[c]


@numba.njit(cache=True, nogil=True)
def _row(neighbours, first, shift, d):
    """Between four packed pixels, CHUNK apart; of the colour at this shift."""
    v1 = (neighbours[first] >> shift) & np.uint32(255)
    v2 = (neighbours[first + CHUNK] >> shift) & np.uint32(255)
    v3 = (neighbours[first + 2 * CHUNK] >> shift) & np.uint32(255)
    v4 = (neighbours[first + 3 * CHUNK] >> shift) & np.uint32(255)
    return _cubic(float(v1), float(v2), float(v3), float(v4), d)


@numba.njit(cache=True, nogil=True)
def _move(source, image, affine, fill):
    """Fill image with the source's pixels at an affine map of each place, both (H, W, 3).

    The 16 neighbours of CHUNK pixels are collected first: the compiler can then take several pixels
    at once.
    """
    height, width, _ = source.shape
    a, b, c, d, e, f = affine
    packed = np.empty(height * width, np.uint32)
    pixels = source.reshape(-1, 3)
    for i in range(len(packed)):
        red, green, blue = pixels[i, 0], pixels[i, 1], pixels[i, 2]
        packed[i] = red | green << 8 | blue << 16
    neighbours = np.zeros(16 * CHUNK, np.uint32)
    columns, found = np.zeros(CHUNK, np.int64), np.zeros(CHUNK, np.uint8)
    across, down = np.zeros(CHUNK), np.zeros(CHUNK)
    for y in range(height):
        for start in range(0, width, CHUNK):
            n = 0
            for x in range(start, min(start + CHUNK, width)):
                from_x = a * (x + 0.5) + b * (y + 0.5) + c
                from_y = d * (x + 0.5) + e * (y + 0.5) + f
                left, top = math.floor(from_x - 0.5), math.floor(from_y - 0.5)
                if 1 <= left < width - 2 and 1 <= top < height - 2:
                    first = np.uintp((top - 1) * width + left - 1)
                    for k in range(16):
                        place = first + np.uintp(k // 4 * width + k % 4)
                        neighbours[k * CHUNK + n] = packed[place]
                    across[n], down[n], columns[n] = from_x - 0.5 - left, from_y - 0.5 - top, x
                    n += 1
                elif 0 <= from_x < width and 0 <= from_y < height:
                    _interpolate(source, from_x, from_y, image, y, x)
                else:
                    for channel in range(3):
                        image[y, x, channel] = fill[channel]
            for channel in range(3):
                shift = np.uint32(8 * channel)
                for i in range(CHUNK):
                    v1 = _row(neighbours, i, shift, across[i])
                    v2 = _row(neighbours, 4 * CHUNK + i, shift, across[i])
                    v3 = _row(neighbours, 8 * CHUNK + i, shift, across[i])
                    v4 = _row(neighbours, 12 * CHUNK + i, shift, across[i])
                    found[i] = _cut(_cubic(v1, v2, v3, v4, down[i]))
                for i in range(n):
                    image[y, columns[i], channel] = found[i]


@numba.njit(cache=True, nogil=True)
def _transpose(source, output):
    for y in range(source.shape[0]):
        for x in range(source.shape[1]):
            for c in range(3):
                output[x, y, c] = source[y, x, c]


@numba.njit(cache=True, nogil=True)
def apply_operation(image, operation, argument, affine, fill):
    """Change image (H, W, 3), uint8; affine is what source_of says of the operation."""
    pixels = image.reshape(-1, 3)
    if operation == NOTHING:
        return
    if operation == ROTATE:
        _move(image.copy(), image, affine, fill)
    elif operation == SHEAR_X or operation == TRANSLATE_X:
        _shift_rows(image.copy(), image, affine[1], affine[2], fill)
    elif operation == SHEAR_Y or operation == TRANSLATE_Y:  # rows are faster than columns
        turned = np.empty((image.shape[1], image.shape[0], 3), np.uint8)
        output = np.empty_like(turned)
        _transpose(image, turned)
        _shift_rows(turned, output, affine[3], affine[5], fill)
        _transpose(output, image)
    elif operation == COLOR:
        _color(image, np.float32(argument))
    elif operation == SHARPNESS:
        _sharpness(image, np.float32(argument))
    else:
        tables = _tables(pixels, operation, argument)
        for i in range(len(pixels)):
            for c in range(3):
                pixels[i, c] = tables[c, pixels[i, c]]


@numba.njit(cache=True, nogil=True, parallel=True)
def augment_batch(images, operations, arguments, affines, fill):
    """Change images (B, H, W, 3); operations and arguments (B, layers), affines (B, layers, 6)."""
    for k in numba.prange(len(images)):
        for i in range(operations.shape[1]):
            a = affines[k, i]
            affine = a[0], a[1], a[2], a[3], a[4], a[5]
            apply_operation(images[k], operations[k, i], arguments[k, i], affine, fill)
