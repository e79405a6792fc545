"""An image as it comes -> the bytes that a .beton file stores."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from evit.data.ffcv import format as beton
from evit.data.ffcv.decode import decode_jpeg
from evit.data.folders import open_image, to_rgb
from evit.data.label_maps import read_label_map

Picture = str | Path | bytes | Image.Image | np.ndarray
Samples = Sequence[tuple[Picture, int]]

MAX_SIDE = 2**16 - 1
FORK = multiprocessing.get_context("fork")  # the samples need not be pickled
LARGEST_PAGE = 2**26  # bytes, for images without a max_resolution


class Encoded(NamedTuple):
    mode: int
    width: int
    height: int
    data: bytes
    original: bool = False  # data are the bytes of the source


BLANK = Encoded(beton.RAW, 0, 0, b"\0")  # in place of an image that is left out


@dataclass(frozen=True)
class Encoder:
    """Turns an image into the bytes to be stored. It is decoded whole, so that a bad one is found.

    EXIF orientation is left aside, as torchvision's ImageFolder and timm do.
    """

    mode: Literal["jpg", "raw"] = "jpg"
    max_resolution: int | None = 500
    jpeg_quality: int = 95

    def __post_init__(self) -> None:
        if self.mode not in ("jpg", "raw"):
            raise ValueError(f"mode={self.mode!r}: choose jpg or raw")
        if self.max_resolution is not None and not 1 <= self.max_resolution <= MAX_SIDE:
            raise ValueError(
                f"max_resolution={self.max_resolution}: give pixels, or null for no limit"
            )
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality={self.jpeg_quality}: choose 1 to 100")

    @property
    def max_bytes(self) -> int:
        return 4 * self.max_resolution**2 + 2**16 if self.max_resolution else LARGEST_PAGE // 2

    def __call__(self, picture: Picture) -> Encoded:
        source = None
        if isinstance(picture, str | Path):
            with open_image(picture) as file:
                picture = file.read()
        if isinstance(picture, bytes):
            source, picture = picture, Image.open(io.BytesIO(picture))
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        image.load()
        encoded = self._encode(image, source)
        if len(encoded.data) > self.max_bytes:
            raise ValueError(f"takes {len(encoded.data)} bytes, too many: set max_resolution")
        return encoded

    def _encode(self, image: Image.Image, source: bytes | None) -> Encoded:
        if 0 in image.size:
            raise ValueError("{} x {} px".format(*image.size))
        size = self._fit(image.size)
        if max(size) > MAX_SIDE:
            raise ValueError(f"a side of {max(size)} px, more than {MAX_SIDE}: set max_resolution")
        if self.mode == "jpg" and source and size == image.size and len(source) <= self.max_bytes:
            if _is_sound_jpeg(image, source):
                return Encoded(beton.JPEG, *size, source, True)
        image = to_rgb(image)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        if self.mode == "raw":
            return Encoded(beton.RAW, *size, image.tobytes())
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.jpeg_quality, subsampling=0)
        return Encoded(beton.JPEG, *size, buffer.getvalue())

    def _fit(self, size: tuple[int, int]) -> tuple[int, int]:
        scale = min(1.0, (self.max_resolution or max(size)) / max(size))
        width, height = (max(1, round(side * scale)) for side in size)
        return width, height


def _is_sound_jpeg(image: Image.Image, data: bytes) -> bool:
    """Whether training would see these bytes as Pillow does, and without a warning."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    pixels = decode_jpeg(data, image.height, image.width)
    if pixels is None:
        return False
    # Two libjpegs may round differently.
    difference = pixels.astype(np.int16) - np.asarray(image.convert("RGB"))
    return bool(np.abs(difference).mean() < 1)


class Dataset:
    """The fields of each sample. It never raises, as FFCV's writer would then wait for ever."""

    def __init__(
        self,
        samples: Samples,
        encoder: Encoder,
        num_classes: int,
        label_maps: Sequence[str] | None,
        layout: beton.Layout,
    ) -> None:
        self.samples, self.encoder, self.num_classes = samples, encoder, num_classes
        self.label_maps, self.layout = label_maps, layout
        self.bad = FORK.SimpleQueue()  # (number, name, what is wrong, whether with the image)
        self.kept: Any = FORK.Value("Q", 0)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        name, of_image = f"sample {index}", True
        blank = np.zeros(self.layout.map_bytes, np.uint8)
        try:
            picture, label = self.samples[index]
            if isinstance(picture, str | Path):
                name = str(picture)
            encoded = self.encoder(picture)
            of_image = False
            if label not in range(self.num_classes):
                raise ValueError(f"{name}: label {label!r} is outside 0 to {self.num_classes - 1}")
            label_map = blank
            if self.label_maps is not None:
                shape = self.layout.label_map_shape
                label_map = read_label_map(self.label_maps[index], self.num_classes, shape).numpy()
        except Exception as error:  # Pillow raises nearly anything on a bad file
            reason = f"{type(error).__name__}: {error}" if of_image else str(error)
            self.bad.put((index, name, reason, of_image))
            return BLANK, 0, blank
        if encoded.original:
            with self.kept.get_lock():
                self.kept.value += 1
        return encoded, int(label), label_map
