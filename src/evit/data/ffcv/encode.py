"""An image as it comes -> the bytes that a .beton file stores."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from evit.data.archives import TarMember
from evit.data.ffcv import format as beton
from evit.data.folders import WAY_OUT, open_image
from evit.data.label_maps import Shape, read_label_map

Picture = str | Path | TarMember | Image.Image | np.ndarray
Samples = Sequence[tuple[Picture, int]]

MAX_SIDE = 2**16 - 1


class Encoded(NamedTuple):
    mode: int
    width: int
    height: int
    label: int
    data: bytes
    original: bool  # data are the bytes of the source
    label_map: bytes = b""


class Stored(NamedTuple):
    """A sample in a file; where its image is, and its label map, their sizes and CRC32s."""

    mode: int
    width: int
    height: int
    label: int
    original: bool
    starts: list[int]
    sizes: list[int]
    crcs: list[int]

    @property
    def end(self) -> int:
        return self.starts[-1] + self.sizes[-1]


class Skipped(NamedTuple):
    name: str
    reason: str


@dataclass(frozen=True)
class Encoder:
    """One sample -> its bytes. Every image is decoded whole, so that a bad one is found here.

    EXIF orientation is left aside, as torchvision's ImageFolder and timm do.
    """

    samples: Samples
    num_classes: int
    max_resolution: int | None
    jpeg_quality: int
    mode: Literal["jpg", "raw"]
    skip_bad: bool
    label_maps: Sequence[str] | None = None
    label_map_shape: Shape | None = None

    def __call__(self, index: int) -> Encoded | Skipped:
        name = f"sample {index}"
        try:
            picture, label = self.samples[index]
            if isinstance(picture, str | Path | TarMember):
                name = str(picture)
            image, source = _load(picture)
            encoded = self._encode(image, source)
        except Exception as error:  # Pillow raises nearly anything on a bad file
            reason = f"{type(error).__name__}: {error}"
            if self.skip_bad:
                return Skipped(name, reason)
            raise ValueError(f"{name} is not a readable image ({reason}): {WAY_OUT}") from None
        if label not in range(self.num_classes):
            raise ValueError(f"{name}: label {label!r} is outside 0 to {self.num_classes - 1}")
        encoded = encoded._replace(label=int(label))
        if self.label_maps is None:
            return encoded
        found = read_label_map(self.label_maps[index], self.num_classes, self.label_map_shape)
        return encoded._replace(label_map=found.numpy().tobytes())

    def _encode(self, image: Image.Image, source: bytes | None) -> Encoded:
        size = self._fit(image.size)
        if max(size) > MAX_SIDE:
            raise ValueError(f"a side of {max(size)} px, more than {MAX_SIDE}: set max_resolution")
        if self.mode == "jpg" and source and size == image.size and _is_sound_jpeg(image, source):
            return Encoded(beton.JPEG, *size, 0, source, True)
        image = image.convert("RGB")
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        if self.mode == "raw":
            return Encoded(beton.RAW, *size, 0, image.tobytes(), False)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.jpeg_quality)
        return Encoded(beton.JPEG, *size, 0, buffer.getvalue(), False)

    def _fit(self, size: tuple[int, int]) -> tuple[int, int]:
        scale = min(1.0, (self.max_resolution or max(size)) / max(size))
        width, height = (max(1, round(side * scale)) for side in size)
        return width, height

    def estimate(self, indices: Iterable[int]) -> tuple[int, int]:
        """Bytes that the readable ones among some samples become, and bytes of their sources."""
        stored = sources = 0
        for index in indices:
            try:
                picture = self.samples[index][0]
                encoded = self._encode(*_load(picture))
            except Exception:
                continue  # told when its turn comes
            stored += len(encoded.data)
            sources += _identify(picture)[1]
        return stored, sources

    def identify(self, index: int) -> tuple[int, int]:
        """A 64-bit hash that a sample, where it changes, does not keep; and bytes of its source."""
        try:
            picture, label = self.samples[index]
        except Exception:
            return 0, 0  # told when its turn comes
        identity, size = _identify(picture)
        if self.label_maps is not None:
            identity += _identify(self.label_maps[index])[0]
        digest = hashlib.blake2b(identity + b"%r" % label, digest_size=8).digest()
        return int.from_bytes(digest, "little"), size


def _identify(picture: Picture) -> tuple[bytes, int]:
    """What tells a picture from others and from its former content, and its bytes."""
    if isinstance(picture, str | Path | TarMember):
        file = picture.archive if isinstance(picture, TarMember) else picture
        try:
            found = os.stat(file)
        except OSError:
            return os.fsencode(f"{picture}\0"), 0
        size = picture.size if isinstance(picture, TarMember) else found.st_size
        return os.fsencode(f"{picture}\0{size}\0{found.st_mtime_ns}\0"), size
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    content = hashlib.blake2b(picture.tobytes(), digest_size=16).digest()
    return b"%r" % (picture.shape,) + content, picture.nbytes


def _read(picture: str | Path | TarMember) -> bytes:
    if isinstance(picture, TarMember):
        return picture.read()
    with open_image(picture) as file:
        return file.read()


def _load(picture: Picture) -> tuple[Image.Image, bytes | None]:
    """The decoded image and, if it has any, the bytes of its file."""
    data = None
    if isinstance(picture, str | Path | TarMember):
        data = _read(picture)
        picture = Image.open(io.BytesIO(data))
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.load()
    if 0 in image.size:
        raise ValueError("{} x {} px".format(*image.size))
    return image, data


def _is_sound_jpeg(image: Image.Image, data: bytes) -> bool:
    """Whether training would see these bytes as Pillow does, and without a warning."""
    from evit.data.ffcv.pixels import decode_jpeg

    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    pixels = decode_jpeg(data, image.height, image.width)
    if pixels is None:
        return False
    # Two libjpegs may round differently.
    difference = pixels.astype(np.int16) - np.asarray(image.convert("RGB"))
    return bool(np.abs(difference).mean() < 1)
