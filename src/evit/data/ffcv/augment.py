"""RandAugment in functions that numba keeps on disk: to the bit the pixels that Pillow gives timm.
They are all in this file: numba looks at no other to tell whether what it has kept is valid."""

import math

import numba
import numpy as np

import evit.data.batch as ra

NOTHING = -1
CHUNK = 32  # pixels that _rotate takes at once
LOW, HIGH = np.float32(0), np.float32(255)
RANGES = np.zeros(ra.NUM_OPERATIONS)  # degrees, or shares of the side
RANGES[[ra.ROTATE, *range(ra.SHEAR_X, ra.TRANSLATE_Y + 1)]] = 30, 0.3, 0.3, 0.45, 0.45
jit = numba.njit(cache=True, nogil=True)


@jit
def _cut(value):
    value = value if value > LOW else LOW
    return np.uint8(value if value < HIGH else HIGH)


@jit
def _stretch(counts, equalize, table):
    """Auto-contrast, or equalization, of one colour's histogram."""
    present = np.flatnonzero(counts)
    low, high = present[0], present[-1]
    step = (counts.sum() - counts[high]) // 255
    if equalize and step > 0:
        n = step // 2
        for i in range(256):
            table[i] = min(255, n // step)
            n += counts[i]
    elif not equalize and high > low:
        scale = 255.0 / (high - low)
        offset = -low * scale
        for i in range(256):
            table[i] = max(0, min(255, int(i * scale + offset)))


@jit
def _tables(pixels, operation, argument):
    """Tabulate (3, 256) the new value of each old one, for an operation that ignores places."""
    tables = np.empty((3, 256), np.uint8)
    tables[:] = np.arange(256)
    if operation == ra.AUTO_CONTRAST or operation == ra.EQUALIZE:
        for c in range(3):
            counts = np.zeros(256, np.int64)
            for value in pixels[:, c]:
                counts[value] += 1
            _stretch(counts, operation == ra.EQUALIZE, tables[c])
        return tables
    number = int(argument)
    for i in range(256):
        value = i
        if operation == ra.INVERT or operation == ra.SOLARIZE and i >= number:
            value = 255 - i
        elif operation == ra.SOLARIZE_ADD and i < 128:
            value = min(255, i + number)
        elif operation == ra.POSTERIZE:
            value = i & -(1 << (8 - number))
        tables[:, i] = value
    return tables


@jit
def _enhance(image, operation, factor):
    """Away from gray, its mean, black, or PIL's SMOOTH, whose border stays as it is."""
    height, length = image.shape[0], 3 * image.shape[1]
    source, other = image.reshape(height, length), image.copy().reshape(height, length)
    pixels, grays = image.reshape(-1, 3), other.reshape(-1, 3)
    if operation == ra.COLOR or operation == ra.CONTRAST:
        for i in range(len(pixels)):
            gray = pixels[i, 0] * 19595 + pixels[i, 1] * 38470 + pixels[i, 2] * 7471 + 0x8000
            grays[i, 0] = grays[i, 1] = grays[i, 2] = gray >> 16
    if operation == ra.CONTRAST:
        grays[:] = int(grays[:, 0].sum() / len(grays) + 0.5)
    elif operation == ra.BRIGHTNESS:
        grays[:] = 0
    elif operation == ra.SHARPNESS:
        share, half, four = np.float32(1 / 13), np.float32(0.5), np.float32(4)
        total = np.empty(length, np.float32)
        for y in range(1, height - 1):
            above, row, below = source[y - 1], source[y], source[y + 1]
            for i in range(length):
                total[i] = np.float32(above[i]) + np.float32(below[i]) + np.float32(row[i])
            left, middle, right = total[:-6], total[3:-3], total[6:]
            centre, smooth = row[3:-3], other[y, 3:-3]
            for i in range(len(smooth)):
                nine = left[i] + middle[i] + right[i] + four * np.float32(centre[i])
                smooth[i] = np.uint8(nine * share + half)
    before, values = other.reshape(-1), image.reshape(-1)
    for i in range(len(values)):
        low, high = np.float32(before[i]), np.float32(values[i])
        values[i] = _cut(low + factor * (high - low))


@jit
def _cubic(v1, v2, v3, v4, d):
    """PIL's, in its order of rounding."""
    return v2 + d * ((-v1 + v3) + d * ((2 * (v1 - v2) + v3 - v4) + d * (-v1 + v2 - v3 + v4)))


@jit
def _shift_rows(image, slope, offset, fill):
    """Shift each row of an image (H, W, 3) by slope * y + offset to the left."""
    height, width, _ = image.shape
    rows, output = image.copy().reshape(height, 3 * width), image.reshape(height, 3 * width)
    line, distances = np.empty(3 * width + 12), np.empty((width, 3))
    for y in range(height):
        for i in range(3 * width):
            line[i + 6] = rows[y, i]
        for i in range(6):  # beyond the edge there is more of its last pixel
            line[i], line[3 * width + 6 + i] = rows[y, i % 3], rows[y, 3 * width - 3 + i % 3]
        shift, begin, end = slope * (y + 0.5), 0, width
        whole = int(math.floor(shift + offset))
        while begin < width and begin + 0.5 + shift + offset < 0:
            begin += 1
        while end > begin and end - 0.5 + shift + offset >= width:
            end -= 1
        image[y, :begin], image[y, end:] = fill, fill
        # As PIL rounds it, which depends on x; without a slope every row has the same.
        for x in range(begin, end if slope != 0 or y == 0 else begin):
            distances[x - begin] = (x + 0.5 + shift + offset) - 0.5 - (x + whole)
        d, inner = distances.reshape(-1), output[y, 3 * begin : 3 * end]
        v1 = line[3 * (begin + whole + 1) :]
        v2, v3, v4 = v1[3:], v1[6:], v1[9:]
        for i in range(len(inner)):
            inner[i] = _cut(_cubic(v1[i], v2[i], v3[i], v4[i], d[i]))


@jit
def _row(neighbours, first, shift, d):
    """Between four packed pixels, CHUNK apart; of the colour at this shift."""
    v1 = (neighbours[first] >> shift) & np.uint32(255)
    v2 = (neighbours[first + CHUNK] >> shift) & np.uint32(255)
    v3 = (neighbours[first + 2 * CHUNK] >> shift) & np.uint32(255)
    v4 = (neighbours[first + 3 * CHUNK] >> shift) & np.uint32(255)
    return _cubic(float(v1), float(v2), float(v3), float(v4), d)


@jit
def _rotate(image, affine, fill):
    """Move the pixels of an image (H, W, 3); their 16 neighbours are collected first, so that the
    compiler takes several pixels at once."""
    height, width, _ = image.shape
    a, b, c = affine[0], affine[1], affine[2]
    d, e, f = affine[3], affine[4], affine[5]
    packed, pixels = np.empty(height * width, np.uint32), image.reshape(-1, 3)
    for i in range(len(packed)):
        packed[i] = pixels[i, 0] | pixels[i, 1] << 8 | pixels[i, 2] << 16
    neighbours = np.zeros(16 * CHUNK, np.uint32)
    columns, found = np.zeros(CHUNK, np.int64), np.zeros(CHUNK, np.uint8)
    across, down = np.zeros(CHUNK), np.zeros(CHUNK)
    for y in range(height):
        for start in range(0, width, CHUNK):
            n = 0
            for x in range(start, min(start + CHUNK, width)):
                from_x = a * (x + 0.5) + b * (y + 0.5) + c
                from_y = d * (x + 0.5) + e * (y + 0.5) + f
                if not (0 <= from_x < width and 0 <= from_y < height):
                    image[y, x] = fill
                    continue
                left, top = int(math.floor(from_x - 0.5)), int(math.floor(from_y - 0.5))
                across[n], down[n], columns[n] = from_x - 0.5 - left, from_y - 0.5 - top, x
                inside = 1 <= left < width - 2 and 1 <= top < height - 2
                for k in range(16):
                    row, column = top - 1 + k // 4, left - 1 + k % 4
                    if not inside:  # beyond the edge there is more of its last pixels
                        row = max(0, min(row, height - 1))
                        column = max(0, min(column, width - 1))
                    neighbours[k * CHUNK + n] = packed[np.uintp(row * width + column)]
                n += 1
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


@jit
def apply_operation(image, operation, argument, affine, fill):
    """Apply an operation to image (H, W, 3), uint8, in place; `affine` is source_of(operation)."""
    if operation == NOTHING:
        return
    if operation == ra.ROTATE:
        _rotate(image, affine, fill)
    elif operation == ra.SHEAR_X or operation == ra.TRANSLATE_X:
        _shift_rows(image, affine[1], affine[2], fill)
    elif operation == ra.SHEAR_Y or operation == ra.TRANSLATE_Y:  # rows are faster than columns
        turned = np.ascontiguousarray(image.transpose((1, 0, 2)))
        _shift_rows(turned, affine[3], affine[5], fill)
        image[:] = turned.transpose((1, 0, 2))
    elif ra.COLOR <= operation <= ra.SHARPNESS:
        _enhance(image, operation, np.float32(argument))
    else:
        pixels = image.reshape(-1, 3)
        tables = _tables(pixels, operation, argument)
        for i in range(len(pixels)):
            for c in range(3):
                pixels[i, c] = tables[c, pixels[i, c]]


@numba.njit(cache=True, nogil=True, parallel=True)
def augment_batch(images, operations, arguments, affines, fill):
    """Change images (B, H, W, 3); operations and arguments (B, layers), affines (B, layers, 6)."""
    for k in numba.prange(len(images)):
        for i in range(operations.shape[1]):
            apply_operation(images[k], operations[k, i], arguments[k, i], affines[k, i], fill)


@jit
def argument_of(operation, level, sign):
    """timm's argument of an operation at a level, 0 to 10; sign is 1 or -1."""
    share = level / 10
    if operation == ra.POSTERIZE:
        return 4.0 - int(share * 4)  # bits
    if operation == ra.SOLARIZE:
        return 256.0 - min(256, int(share * 256))  # the value from which on it inverts
    if operation == ra.SOLARIZE_ADD:
        return float(min(128, int(share * 110)))
    if ra.COLOR <= operation <= ra.SHARPNESS:
        return max(0.1, 1 + sign * (share * 0.9))
    return sign * (share * RANGES[operation])


@jit
def draw(seeds, layers, magnitude, mstd, probability, maximum):
    """Operations (B, layers), NOTHING where none is applied, and their arguments (B, layers)."""
    operations = np.full((len(seeds), layers), NOTHING)
    arguments = np.zeros((len(seeds), layers))
    for k in range(len(seeds)):
        np.random.seed(seeds[k])
        for layer in range(layers):
            operation = np.random.randint(0, ra.NUM_OPERATIONS)
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
