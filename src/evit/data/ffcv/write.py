"""Write .beton files for FFCV: all of a file or nothing."""

import ctypes
import fcntl
import io
import itertools
import json
import os
import signal
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import evit.data.ffcv as beton
from evit.data.ffcv.decode import decode_jpeg
from evit.data.folders import WAY_OUT, open_image, to_rgb
from evit.data.label_maps import read_label_map
from evit.files import followed, whole_file

PAGE = 2**26  # bytes; no piece of data crosses from one to the next
MAX_SIDE = 2**16 - 1


def encode(picture: Any, mode="jpg", max_resolution: int | None = 500, jpeg_quality=95) -> Any:
    """An image's mode, width, height, the bytes to store, and whether these are the file's own."""
    source = None
    if isinstance(picture, str | Path):
        with open_image(picture) as file:
            picture = file.read()
    if isinstance(picture, bytes):
        source, picture = picture, Image.open(io.BytesIO(picture))
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.load()
    scale = min(1.0, (max_resolution or max(image.size)) / max(image.size))
    width, height = size = tuple(max(1, round(side * scale)) for side in image.size)
    if max(size) > MAX_SIDE:
        raise ValueError(f"a side of {max(size)} px, more than {MAX_SIDE}: set max_resolution")
    if mode == "jpg" and source and size == image.size and _is_sound_jpeg(image, source):
        return beton.JPEG, width, height, source, True
    image = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "raw":
        return beton.RAW, width, height, image.tobytes(), False
    image.save(buffer := io.BytesIO(), "JPEG", quality=jpeg_quality, subsampling=0)
    return beton.JPEG, width, height, buffer.getvalue(), False


def _is_sound_jpeg(image: Image.Image, data: bytes) -> bool:
    """Whether our decoder gives the pixels of Pillow for these bytes."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    pixels = decode_jpeg(data, image.height, image.width)
    right = np.asarray(image.convert("RGB"), np.int16)  # another libjpeg may round differently
    return pixels is not None and bool(np.abs(pixels - right).mean() < 1)


class _Encoded(Dataset):
    def __init__(self, samples: Any, options: Any, classes: int, maps: Any) -> None:
        self.samples, self.options, self.num_classes, self.maps = samples, options, classes, maps
        self.map_shape = read_label_map(maps[0], classes).shape[2:] if maps else None

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Image, label and label map; or an error, and the image's name if it is the image's."""
        name: Any = f"sample {index}"
        try:
            picture, label = self.samples[index]
            name = str(picture) if isinstance(picture, str | Path) else name
            encoded = encode(picture, **self.options)
            if len(encoded[3]) >= PAGE:
                raise ValueError(f"takes {len(encoded[3])} bytes, too many: set max_resolution")
        except Exception as error:  # Pillow raises nearly anything on a bad file
            return f"{type(error).__name__}: {error}", name
        if label not in range(self.num_classes):
            return f"{name}: label {label!r} is outside 0 to {self.num_classes - 1}", None
        try:
            map_ = self.maps and read_label_map(self.maps[index], self.num_classes, self.map_shape)
        except ValueError as error:
            return str(error), None
        return encoded, int(label), map_.numpy().tobytes() if map_ is not None else b""


def write_beton(
    path: str | Path,
    samples: Any,
    *,
    classes: list[str],
    source: str,
    max_resolution: int | None = 500,
    jpeg_quality: int = 95,
    mode: str = "jpg",
    num_workers: int | None = None,  # all cores
    skip_bad: bool = False,
    label_maps: list[str] | None = None,
    identity: str | None = None,
) -> dict[str, Any]:
    """Write a map-style data set of (image, label) to `path`; return the content of its sidecar.
    An image is a path, the bytes of a file, a PIL image or an array of uint8. A file of the same
    settings and samples, which `identity` tells from others, is left as it is. After an error
    `path` is as it was before (ValueError, OSError; RuntimeError if a process died)."""
    path, count = Path(path), len(samples)
    options = dict(mode=mode, max_resolution=max_resolution, jpeg_quality=jpeg_quality)
    sides = max_resolution is None or 1 <= max_resolution <= MAX_SIDE
    if mode not in ("jpg", "raw") or not 1 <= jpeg_quality <= 100 or not sides:
        way = "mode is jpg or raw, max_resolution pixels or null, jpeg_quality 1 to 100"
        raise ValueError(f"{options}: {way}")
    head: dict[str, Any] = dict(format=beton.SIDECAR_FORMAT, source=source, classes=list(classes))
    head |= dict(num_classes=len(classes), identity=identity, **options)
    dataset = _Encoded(samples, options, len(classes), label_maps)
    how: Any = dict(num_workers=num_workers or len(os.sched_getaffinity(0)), collate_fn=list)
    # A process that is killed cannot end its workers: the system does (PR_SET_PDEATHSIG).
    how |= dict(worker_init_fn=lambda _: ctypes.CDLL(None).prctl(1, signal.SIGKILL))
    how |= dict(multiprocessing_context="fork")
    how |= dict(generator=torch.Generator())  # not the global one
    loader: Any = DataLoader(dataset, 32, sampler=range(count), **how)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)  # one writer at a time
        with suppress(beton.BetonError):
            there = beton.open_beton(path)[0]
            same = identity is not None and there.items() >= head.items()
            if same and (skip_bad or not there["skipped"]):
                print(f"{path} is there already, of the same images", flush=True)
                return there
        with whole_file(path) as file:
            shown = followed(loader, f"Writing {path.name}", len(loader))
            sidecar = head | _write(file, shown, count, dataset.map_shape, skip_bad)
            if not sidecar["num_samples"]:
                raise ValueError(f"{path}: nothing to write, {source} has no readable images")
            sidecar["crc32"] = beton.sidecar_crc32(sidecar)
            # It is there before its file: until then the pair does not match, and is refused.
            with whole_file(beton.sidecar_path(path)) as description:
                description.write(json.dumps(sidecar, indent=1).encode())
    finally:
        os.close(folder)
    return sidecar


def _write(file: BinaryIO, batches: Any, count: int, shape: Any, skip_bad: bool) -> dict[str, Any]:
    """Write the file, and return what the sidecar says of its content."""
    fields, metadata = beton.layout(shape)
    at = beton.HEADER.itemsize + fields.nbytes + count * metadata.itemsize
    skipped, records, table, kept = list[Any](), list[Any](), list[Any](), 0
    for image, *rest in itertools.chain.from_iterable(batches):
        if isinstance(image, str):
            if rest[0] is None:
                raise ValueError(image)
            if not skip_bad:
                raise ValueError(f"{rest[0]} is not a readable image ({image}): {WAY_OUT}")
            skipped.append(dict(name=rest[0], reason=image))
            continue
        (*size, pixels, original), (label, label_map), starts = image, rest, []
        kept += original
        for data in (pixels, label_map)[: len(fields) - 1]:
            if at // PAGE != (at + len(data) - 1) // PAGE:
                at = -(-at // PAGE) * PAGE
            starts.append(at)
            table.append((len(records), at, len(data)))
            file.seek(at)
            file.write(data)
            at += len(data)
        records.append(((*size, starts[0]), label, *starts[1:]))
    # Where images were left out, unused bytes lie between the metadata and the data.
    head = np.array([(2, len(fields), PAGE, len(records), at)], beton.HEADER).tobytes()
    head += fields.tobytes() + np.array(records, metadata).tobytes()
    end = np.array(table, beton.ALLOCATION).tobytes()
    file.write(end)
    file.seek(0)
    file.write(head)
    said: dict[str, Any] = dict(label_map_shape=list(shape)) if shape else {}
    said |= dict(num_samples=len(records), bytes=at + len(end), kept_original=kept)
    return said | dict(skipped=skipped, index_crc32=zlib.crc32(end, zlib.crc32(head)))
