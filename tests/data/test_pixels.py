"""Crops decoded in part against the same crops of Pillow's whole decode."""

import ctypes
import io
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evit.data.ffcv import decode as _decode
from evit.data.ffcv.decode import _decode_jpeg, crop_image, decode_jpeg

SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2, "gray": 3, "4:4:0": 4, "4:1:1": 5}
PROGRESSIVE = 16384


def photo(seed, height, width):
    """Coloured noise with the spectrum of natural images, amplitude 1 / frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    spectra = np.fft.fft2(rng.standard_normal((3, height, width))) / frequency
    bands = np.fft.ifft2(spectra).real.transpose(1, 2, 0)
    bands = bands[..., :1] + 0.3 * bands  # mostly grey
    bands *= 50 / max(bands.std(), 1e-9)
    return np.clip(bands + 128, 0, 255).astype(np.uint8)


def jpeg(pixels, subsampling="4:2:0", progressive=False):
    """Encoded by libturbojpeg, which unlike Pillow knows every subsampling."""
    library = ctypes.CDLL("libturbojpeg.so.0")
    library.tjInitCompress.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(library.tjInitCompress())
    data, size = ctypes.c_void_p(), ctypes.c_ulong()
    flags = PROGRESSIVE if progressive else 0
    failed = library.tjCompress2(
        *(handle, pixels.ctypes.data_as(ctypes.c_void_p), pixels.shape[1], 0, pixels.shape[0], 0),
        *(ctypes.byref(data), ctypes.byref(size), SUBSAMPLINGS[subsampling], 90, flags),
    )
    assert not failed
    encoded = ctypes.string_at(data, size.value)
    library.tjFree(data)
    library.tjDestroy(handle)
    return encoded


def crop(data, size, box, output, flip=False, shrinks=True):
    found = np.empty((*output, 3), np.uint8)
    box = np.array(box, np.int64)
    status = crop_image(np.frombuffer(data, np.uint8), True, size, box, flip, shrinks, found)
    return None if status else found


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def area(start, length, size, source):
    """The shares (size, source) of source pixels in `size` equal parts of an interval."""
    edges = start + length * np.arange(size + 1) / size
    covered = np.clip(edges[:, None] - np.arange(source), 0, 1)
    return np.diff(covered, axis=0) * size / length


def area_mean(pixels, box, output):
    top, left, height, width = box
    rows = area(top, height, output[0], pixels.shape[0])
    columns = area(left, width, output[1], pixels.shape[1])
    return np.einsum("yr,rcb,xc->yxb", rows, pixels.astype(float), columns, optimize=True)


def boxes(seed, size, count):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        starts, ends = zip(*(sorted(rng.choice(side + 1, 2, False)) for side in size), strict=True)
        yield *starts, *(end - start for start, end in zip(starts, ends, strict=True))


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_every_pixel_of_a_crop_is_pillows(subsampling, progressive, restarts, monkeypatch):
    if restarts:
        monkeypatch.setenv("TJ_RESTART", "2B")
    for seed, size in enumerate([(75, 103), (128, 64), (17, 9), (1, 1), (2, 50)]):
        data = jpeg(photo(seed, *size), subsampling, progressive)
        assert (b"\xff\xdd" in data) == restarts
        whole = pillow(data)
        for top, left, height, width in boxes(seed, size, 25):
            found = crop(data, size, (top, left, height, width), (height, width))
            assert np.array_equal(found, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("output", [(20, 20), (90, 30), (30, 170), (200, 190)])
def test_resizing_is_the_mean_over_areas(output):
    pixels = photo(0, 100, 120)
    data = jpeg(pixels)
    for box in boxes(1, (100, 120), 20):
        expected = area_mean(pillow(data), box, output)
        found = crop(data, (100, 120), box, output, shrinks=False)
        assert np.abs(found - expected).max() < 0.51
        assert np.array_equal(crop(data, (100, 120), box, output, True, False), found[:, ::-1])


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4", "gray"])
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_at_a_lower_scale_crops_differ_less_than_by_a_filter_or_a_pixel(shrink, subsampling):
    size, (height, width) = (611, 803), (531, 560)
    data = jpeg(photo(shrink, *size), subsampling, progressive=shrink == 4)
    image, whole = Image.open(io.BytesIO(data)).convert("RGB"), pillow(data)
    differences, filters = [], []
    positions = [(0, 0), (80, 243), (37, 101), (13, 64), (50, 7)]
    for (top, left), ratio in zip(positions, [2.0, 2.4, 2.8, 3.2, 3.7], strict=True):
        output = int(height / ratio / shrink), int(width / ratio / shrink)
        found = crop(data, size, (top, left, height, width), output)
        cut = image.crop((left, top, left + width, top + height))
        bilinear, bicubic = (
            np.asarray(cut.resize(output[::-1], resample), float)
            for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
        )
        filters.append(np.abs(bilinear - bicubic).mean())
        to_there = {}
        for y, x in [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]:
            if top + y >= 0 and left + x >= 0:
                expected = area_mean(whole, (top + y, left + x, height, width), output)
                to_there[y, x] = np.abs(found - expected).mean()
        assert min(to_there, key=to_there.get) == (0, 0)
        differences.append(to_there[0, 0])
    assert np.mean(differences) < np.mean(filters)


def test_no_more_of_a_jpeg_is_decoded_than_a_crop_needs():
    """Nothing below it, and less than the full scale where that leaves twice the pixels."""
    size, top, whole = (200, 200), (0, 0, 80, 200), (0, 0, 200, 200)
    data = jpeg(photo(3, *size))
    cut = data[: len(data) * 3 // 4]
    assert np.array_equal(crop(cut, size, top, (64, 64)), crop(data, size, top, (64, 64)))
    assert crop(cut, size, whole, (64, 64)) is None and decode_jpeg(cut, *size) is None
    for *output, shrunk in (50, 20, 1), (20, 50, 1), (51, 20, 0), (20, 51, 0):
        found = [crop(data, size, whole, output, shrinks=may) for may in (True, False)]
        assert np.array_equal(*found) != shrunk


@pytest.mark.parametrize("size", [(1, 65500), (65500, 1), (3, 9000)])
def test_the_longest_images_are_cropped(size):
    data = jpeg(np.full((*size, 3), 90, np.uint8))
    for output in (1, 1), (40, 2):
        found = crop(data, size, (0, 0, *size), output)
        assert np.abs(found - 90.0).max() <= 1


@pytest.mark.parametrize("size", [(199, 200), (200, 201), (400, 400)])
def test_a_jpeg_of_another_size_than_the_file_says_is_damaged(size):
    assert crop(jpeg(photo(3, 200, 200)), size, (0, 0, 10, 10), (8, 8)) is None


def mutated(data, rng):
    """One to eight bytes changed, the end cut off, or another size in the header."""
    content = bytearray(data)
    kind = rng.integers(4)
    if kind == 0:
        del content[rng.integers(1, len(content)) :]
    elif kind == 1:
        place = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2")) + 5
        content[place : place + 4] = rng.bytes(4)
    else:
        for place in rng.integers(0, 700 if kind == 2 else len(content), rng.integers(1, 9)):
            content[place % len(content)] ^= rng.integers(1, 256)
    return bytes(content)


@pytest.mark.parametrize("count", [300, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_damaged_jpeg_is_written_beyond_its_buffer(count):
    """What is before and behind the pixels stays, whatever libjpeg reads and whatever is asked."""
    function, rng = _decode._library().evit_jpeg_crop, np.random.default_rng(0)
    function.argtypes = [ctypes.c_char_p, ctypes.c_ulong, *[ctypes.c_uint32] * 7]
    function.argtypes += [ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p]
    whole = [
        (jpeg(photo(3, 40, 56), name, progressive), 56, 40)
        for name in SUBSAMPLINGS
        for progressive in (False, True)
    ]
    guard, found, failures = 4096, np.zeros(3, np.uint32), 0
    for _ in range(count):
        data, width, height = whole[rng.integers(len(whole))]
        shrink = 2 ** int(rng.integers(4))
        top, bottom = sorted(rng.integers(0, -(-height // shrink) + 1, 2).tolist())
        left, right = sorted(rng.integers(0, -(-width // shrink) + 1, 2).tolist())
        stride = 3 * (right - left + 42)  # as evit.data.ffcv.decode has it
        memory = np.full(2 * guard + stride * (bottom - top), 0xA5, np.uint8)
        data = mutated(data, rng)
        status = function(
            *(data, len(data), width, height, shrink, top, bottom, left, right),
            *(memory.ctypes.data + guard, stride, found[1:].ctypes.data),
        )
        failures += status != 0
        assert (memory[:guard] == 0xA5).all() and (memory[-guard:] == 0xA5).all()
        assert found[0] == found[2] == 0
    assert 0.3 * count < failures < count


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A copy of the C source that nothing has been made of yet."""
    source = tmp_path / "package" / _decode.SOURCE.name
    source.parent.mkdir()
    source.write_bytes(_decode.SOURCE.read_bytes())
    monkeypatch.setattr(_decode, "SOURCE", source)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return source.parent


def test_without_a_compiler_it_is_said_what_to_install(elsewhere, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ImportError, match="no-such-compiler.*make setup.*libjpeg-dev"):
        _decode._library()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """make_jpeg.c, compiled as jpeg_crop.c is."""
    path = tmp_path_factory.mktemp("library") / "make_jpeg.so"
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    flags = run(["pkg-config", "--cflags", "--libs", "libjpeg"]).stdout.split()
    source = Path(__file__).with_name("make_jpeg.c")
    run(["cc", "-O2", "-shared", "-fPIC", str(source), "-o", str(path), *flags])
    found = ctypes.CDLL(str(path))
    found.make_jpeg.restype = ctypes.c_ulong
    return found


GRAY, RGB, YCBCR, CMYK, YCCK = 1, 2, 3, 4, 5  # libjpeg's J_COLOR_SPACE
SPACES = {GRAY: (GRAY, 1), RGB: (RGB, 3), YCBCR: (RGB, 3), CMYK: (CMYK, 4), YCCK: (CMYK, 4)}
LUMA = [(h, v) for h in range(1, 5) for v in range(1, 5) if h * v <= 8]


def make(library, rng, size, space, factors, progressive, arithmetic, restart):
    """A JPEG of blocks of random colours, None where libjpeg writes no such file."""
    source, channels = SPACES[space]
    coarse = rng.integers(0, 256, (size[0] // 4 + 1, size[1] // 4 + 1, channels), dtype=np.uint8)
    pixels = np.ascontiguousarray(coarse.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]])
    data = ctypes.c_void_p()
    count = library.make_jpeg(
        *(pixels.ctypes.data_as(ctypes.c_void_p), size[1], size[0], channels, source, space),
        *((ctypes.c_int * len(factors))(*factors), progressive, arithmetic, restart),
        ctypes.byref(data),
    )
    found = ctypes.string_at(data, count) if count else None
    if data:
        library.free_jpeg(data)
    return found


def whole(library, data, size, shrink):
    """All of it by libjpeg, None where it fails."""
    found = np.zeros((*(-(-side // shrink) for side in size), 3), np.uint8)
    target = found.ctypes.data_as(ctypes.c_void_p)
    failed = library.whole_jpeg(data, ctypes.c_ulong(len(data)), shrink, target)
    return None if failed else found


@pytest.mark.parametrize("count", [400, pytest.param(8000, marks=pytest.mark.slow)])
def test_a_part_of_any_jpeg_is_that_part_of_the_whole(library, count):
    """Any sampling of each component, progressive, arithmetic, restart markers, colour spaces."""
    rng, seen, refused = np.random.default_rng(0), 0, 0
    for _ in range(count):
        space = int(rng.choice([GRAY, RGB, YCBCR, YCBCR, YCBCR, CMYK, YCCK]))
        components = SPACES[space][1]
        factors = list(rng.integers(1, 5, 2 * components))
        if rng.random() < 0.7:  # as cameras and programs write it
            factors = [*LUMA[rng.integers(len(LUMA))], *[1] * (2 * components - 2)]
        size = tuple(rng.integers(1, 150, 2).tolist())
        kind = rng.integers(2), rng.integers(2), rng.integers(3)
        data = make(library, rng, size, space, factors, *map(int, kind))
        if data is None:
            continue
        for shrink in 1, 2, 4, 8:
            expected = whole(library, data, size, shrink)
            for top, left, height, width in boxes(seen, [-(-side // shrink) for side in size], 3):
                part = top, top + height, left, left + width
                pixels, found, status = _decode_jpeg(
                    np.frombuffer(data, np.uint8), *size, shrink, *part
                )
                seen += 1
                refused += status != 0
                assert (expected is None) == (status != 0)
                if expected is not None:
                    right = expected[top : top + height, left : left + width]
                    assert np.array_equal(pixels[:, found : found + width], right), (
                        factors,
                        shrink,
                    )
    assert seen > 4 * count and 0 < refused < seen / 2  # CMYK is left to Pillow
