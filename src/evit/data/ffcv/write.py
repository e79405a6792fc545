"""Write .beton files for FFCV: all of a file or nothing."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import json
import multiprocessing
import os
import signal
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.progress import track

from evit.data.ffcv import format as beton
from evit.data.ffcv.decode import decode_jpeg
from evit.data.folders import WAY_OUT, open_image, to_rgb
from evit.data.label_maps import read_label_map
from evit.files import whole_file

Picture = str | Path | bytes | Image.Image | np.ndarray

PAGE = 2**26  # bytes; no piece of data crosses from one to the next
MAX_SIDE = 2**16 - 1
CHUNK = 8  # images that a process takes at a time
ROOM = (
    "make room, lower max_resolution or jpeg_quality, or choose another folder (target=DIR of "
    "src/prepare.py, data.cache_dir=DIR of src/train.py)"
)


class Encoded(NamedTuple):
    mode: int
    width: int
    height: int
    data: bytes
    original: bool = False  # data are the bytes of the source


def encode(
    picture: Picture, mode: str = "jpg", max_resolution: int | None = 500, jpeg_quality: int = 95
) -> Encoded:
    """Turn an image into the bytes to be stored. It is decoded whole, so that a bad one is found.

    EXIF orientation is left aside, as torchvision's ImageFolder and timm do.
    """
    source = None
    if isinstance(picture, str | Path):
        with open_image(picture) as file:
            picture = file.read()
    if isinstance(picture, bytes):
        source, picture = picture, Image.open(io.BytesIO(picture))
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.load()
    if 0 in image.size:
        raise ValueError("{} x {} px".format(*image.size))
    scale = min(1.0, (max_resolution or max(image.size)) / max(image.size))
    width, height = size = tuple(max(1, round(side * scale)) for side in image.size)
    if max(size) > MAX_SIDE:
        raise ValueError(f"a side of {max(size)} px, more than {MAX_SIDE}: set max_resolution")
    if mode == "jpg" and source and size == image.size and _is_sound_jpeg(image, source):
        return Encoded(beton.JPEG, width, height, source, True)
    image = to_rgb(image)
    if size != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if mode == "raw":
        return Encoded(beton.RAW, width, height, image.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=jpeg_quality, subsampling=0)
    return Encoded(beton.JPEG, width, height, buffer.getvalue())


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


class _Job(NamedTuple):
    """What the processes that encode have in common."""

    samples: Any
    options: dict[str, Any]
    num_classes: int
    label_maps: Sequence[str] | None
    map_shape: beton.Shape | None

    def sample(self, index: int) -> tuple[Encoded, int, bytes] | tuple[str, str]:
        """Image, label and label map; of an image that is bad, its name and what is wrong."""
        name = f"sample {index}"
        try:
            picture, label = self.samples[index]
            name = str(picture) if isinstance(picture, str | Path) else name
            encoded = encode(picture, **self.options)
            if len(encoded.data) >= PAGE:
                raise ValueError(f"takes {len(encoded.data)} bytes, too many: set max_resolution")
        except Exception as error:  # Pillow raises nearly anything on a bad file
            return name, f"{type(error).__name__}: {error}"
        if label not in range(self.num_classes):
            raise ValueError(f"{name}: label {label!r} is outside 0 to {self.num_classes - 1}")
        if self.label_maps is None:
            return encoded, int(label), b""
        label_map = read_label_map(self.label_maps[index], self.num_classes, self.map_shape)
        return encoded, int(label), label_map.numpy().tobytes()


_job: _Job  # of a process that encodes


def _begin(job: _Job) -> None:
    """Begin as a process that encodes, and dies with its parent."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _sample(index: int) -> Any:
    return _job.sample(index)


def _encoded(job: _Job, num_workers: int) -> Iterator[Any]:
    """The samples in order, encoded by processes, of which only a few images are under way."""
    fork = multiprocessing.get_context("fork")  # the samples need not be pickled
    try:
        with ProcessPoolExecutor(num_workers, fork, _begin, (job,)) as pool:
            count, step = len(job.samples), 8 * CHUNK * num_workers
            for start in range(0, count, step):
                block = range(start, min(start + step, count))
                yield from pool.map(_sample, block, chunksize=CHUNK)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that encodes images died: it was killed, perhaps for want of memory (then "
            "use fewer num_workers), or the data set crashed it"
        ) from error


def write_beton(
    path: str | Path,
    samples: Any,
    *,
    classes: Sequence[str],
    source: str,
    max_resolution: int | None = 500,
    jpeg_quality: int = 95,
    mode: str = "jpg",
    num_workers: int = -1,
    progress: bool = False,
    skip_bad: bool = False,
    label_maps: Sequence[str] | None = None,
    identity: str | None = None,
) -> dict[str, Any]:
    """Write samples of (image, label) to `path`, and return the content of its sidecar.

    Args:
        samples: a map-style data set; an image is a path, the bytes of a file, a PIL image or an
            array (H, W) or (H, W, 3) of uint8.
        max_resolution: pixels of the long side; mode jpg keeps the bytes of a JPEG within it, and
            encodes everything else.
        jpeg_quality: of what is encoded, at full colour resolution (4:4:4).
        mode: jpg, or raw pixels.
        num_workers: processes; -1: one per core.
        skip_bad: leave unreadable images out, and list them in the sidecar.
        label_maps: files (evit.data.label_maps) of the samples, in order, all of one shape.
        identity: what tells these samples from others. A file that is there already, of the same
            identity and settings, is left as it is; None: it is always written.

    Raises:
        ValueError: an image, a label, an argument, a full disk. `path` is as it was before.
        RuntimeError: a process that encodes died. `path` is as it was before.
    """
    path = Path(path)
    if mode not in ("jpg", "raw"):
        raise ValueError(f"mode={mode!r}: choose jpg or raw")
    if max_resolution is not None and not 1 <= max_resolution <= MAX_SIDE:
        raise ValueError(f"max_resolution={max_resolution}: give pixels, or null for no limit")
    if not 1 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality={jpeg_quality}: choose 1 to 100")
    if not len(samples):
        raise ValueError(f"{path}: nothing to write, {source} has no images")
    shape = None
    if label_maps is not None:
        first = read_label_map(label_maps[0], len(classes))
        shape = first.shape[2], first.shape[3]
    options = dict(mode=mode, max_resolution=max_resolution, jpeg_quality=jpeg_quality)
    head: dict[str, Any] = dict(format=beton.SIDECAR_FORMAT, source=source, classes=list(classes))
    head |= dict(num_classes=len(classes), identity=identity, **options)
    job = _Job(samples, options, len(classes), label_maps, shape)
    cores = num_workers if num_workers > 0 else len(os.sched_getaffinity(0))
    encoded = _encoded(job, min(cores, -(-len(samples) // CHUNK)))
    if progress:
        encoded = iter(track(encoded, f"Writing {path.name}", total=len(samples)))
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, partial = os.open(path.parent, os.O_RDONLY), path.with_name(f".{path.name}.tmp")
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)  # one writer at a time
        with suppress(beton.BetonError):
            there = beton.check_beton(path)
            same = identity is not None and there.items() >= head.items()
            if same and (skip_bad or not there["skipped"]):
                print(f"{path} is there already, of the same images", flush=True)
                return there
        sidecar = head | _write(partial, encoded, len(samples), shape, skip_bad)
        sidecar["crc32"] = beton.sidecar_crc32(sidecar)
        # Between the two renames the pair does not match, which check_beton refuses.
        with whole_file(beton.sidecar_path(path)) as file:
            file.write(json.dumps(sidecar, indent=1).encode())
        os.replace(partial, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(f"{path.parent} is full: {ROOM}") from error
    finally:
        partial.unlink(missing_ok=True)
        os.close(folder)
    return sidecar


def _write(
    path: Path, encoded: Iterator[Any], count: int, shape: beton.Shape | None, skip_bad: bool
) -> dict[str, Any]:
    """Write the file, and say what the sidecar tells of its content."""
    layout, skipped, kept = beton.Layout(shape), list[dict[str, str]](), 0
    records, table = list[tuple[Any, ...]](), list[tuple[int, int, int]]()
    at = layout.metadata_start + count * layout.metadata.itemsize
    with open(path, "wb") as file:
        for image, *rest in encoded:
            if isinstance(image, str):
                if not skip_bad:
                    raise ValueError(f"{image} is not a readable image ({rest[0]}): {WAY_OUT}")
                skipped.append(dict(name=image, reason=rest[0]))
                continue
            label, label_map = rest
            kept += image.original
            starts = []
            for data in (image.data, label_map)[: layout.pieces]:
                if at // PAGE != (at + len(data) - 1) // PAGE:
                    at = -(-at // PAGE) * PAGE
                starts.append(at)
                table.append((len(records), at, len(data)))
                file.seek(at)
                file.write(data)
                at += len(data)
            records.append(((*image[:3], starts[0]), label, *starts[1:]))
        if not records:
            raise ValueError("nothing to write, it has no readable image")
        # Where images were left out, unused bytes lie between the metadata and the data.
        numbers = beton.BETON_VERSION, len(layout.fields), PAGE, len(records), at
        head = np.array([numbers], beton.HEADER).tobytes() + layout.fields.tobytes()
        head += np.array(records, layout.metadata).tobytes()
        end = np.array(table, beton.ALLOCATION).tobytes()
        file.write(end)
        file.seek(0)
        file.write(head)
        file.flush()
        os.fsync(file.fileno())
    found = dict(label_map_shape=list(shape)) if shape else {}
    return found | dict(
        num_samples=len(records),
        bytes=at + len(end),
        index_crc32=zlib.crc32(end, zlib.crc32(head)),
        kept_original=kept,
        skipped=skipped,
    )
