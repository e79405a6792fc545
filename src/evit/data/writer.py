"""Write .beton files: the same bytes whatever the number of processes, all of a file or none."""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from evit.data import beton
from evit.data.encode import Encoded, Encoder, Samples, Skipped
from evit.data.label_maps import read_label_map
from evit.data.progress import shown

CHUNK = 32  # images that a process is sent at a time
PAGE_SIZE = 2**23


def write_beton(
    path: str | Path,
    samples: Samples,
    *,
    classes: Sequence[str],
    source: str,
    max_resolution: int | None = 500,
    jpeg_quality: int = 95,
    mode: Literal["jpg", "raw"] = "jpg",
    num_workers: int = -1,
    progress: bool = False,
    skip_bad: bool = False,
    extra: dict[str, Any] | None = None,
    label_maps: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write samples of (image, label) to `path`, and return the content of its sidecar.

    An image is a path, a PIL image or a uint8 array (H, W) or (H, W, C). Mode jpg keeps the bytes
    of a JPEG whose long side is at most `max_resolution` and encodes everything else; mode raw
    stores pixels. `num_workers` -1 uses every core. `extra` is added to the sidecar. `label_maps`
    are the files (evit.data.label_maps) of the samples, in order; they all have one shape.

    Raises ValueError for what the caller can mend (an image, a label, an argument, a full disk)
    and RuntimeError if a worker process dies; then `path` is as it was before.
    """
    path = Path(path)
    if len(samples) == 0:
        raise ValueError(f"{path}: nothing to write, {source} has no samples")
    if mode not in ("jpg", "raw"):
        raise ValueError(f"mode={mode!r}: choose jpg or raw")
    if max_resolution is not None and max_resolution < 1:
        raise ValueError(f"max_resolution={max_resolution}: give pixels, or null for no limit")
    if not 1 <= jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality={jpeg_quality}: choose 1 to 100")
    num_workers = num_workers if num_workers > 0 else len(os.sched_getaffinity(0))
    layout = beton.Layout()
    if label_maps is not None:
        first = read_label_map(label_maps[0], len(classes))
        layout = beton.Layout((first.shape[2], first.shape[3]))
    encoder = Encoder(
        samples,
        len(classes),
        max_resolution,
        jpeg_quality,
        mode,
        skip_bad,
        label_maps,
        layout.label_map_shape,
    )

    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as (beton_file, sidecar_file), _pool(encoder, num_workers) as pool:
        some = range(0, len(samples), -(-len(samples) // 100))
        estimate = pool.submit(_estimate, some).result() + layout.map_bytes
        _require_space(path, len(samples) * estimate)
        encoded = _encode_all(pool, len(samples), num_workers)
        encoded = shown(encoded, len(samples), f"Writing {path.name}", progress)
        sidecar = {
            **(extra or {}),
            "format": beton.SIDECAR_FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "source": source,
            "classes": list(classes),
            "num_classes": len(classes),
            "mode": mode,
            "max_resolution": max_resolution,
            "jpeg_quality": jpeg_quality,
            **_write(beton_file, encoded, len(samples), layout),
        }
        if sidecar["num_samples"] == 0:
            raise ValueError(f"{path}: nothing to write, none of {source} is a readable image")
        sidecar_file.write(json.dumps(sidecar, indent=1).encode())
    return sidecar


def _write(
    file: BinaryIO,
    encoded: Iterable[Encoded | Skipped],
    max_samples: int,
    layout: beton.Layout,
) -> dict[str, Any]:
    """Write the file in data set order, and return what the sidecar says about its content."""
    metadata = np.zeros(max_samples, layout.metadata)
    allocations = np.zeros((max_samples, layout.pieces), beton.ALLOCATION)
    crcs = np.zeros((max_samples, layout.pieces), beton.CRC)
    skipped: list[Skipped] = []
    page_size, count, kept = PAGE_SIZE, 0, 0
    end = file.seek(layout.metadata_start + metadata.nbytes)
    for sample in encoded:
        if isinstance(sample, Skipped):
            skipped.append(sample)
            continue
        for piece, data in enumerate((sample.data, sample.label_map)[: layout.pieces]):
            size = len(data)
            # FFCV's process cache wants a sample inside one page. One that crosses no boundary of
            # small pages crosses none of larger ones, so pages can grow as they have to.
            while page_size < size:
                page_size *= 2
            if end % page_size + size > page_size:
                end += page_size - end % page_size
            file.seek(end)
            file.write(data)
            allocations[count, piece] = count, end, size
            crcs[count, piece] = zlib.crc32(data)
            end += size
        start, *map_start = allocations["ptr"][count]
        image = sample.mode, sample.width, sample.height, start
        metadata[count] = image, sample.label, *map_start
        count += 1
        kept += sample.original

    metadata, allocations, crcs = metadata[:count], allocations[:count], crcs[:count]
    file.seek(end)
    file.write(crcs.tobytes())
    table = file.tell()
    file.write(allocations.tobytes())
    num_bytes = file.tell()
    header = np.array(
        [(beton.BETON_VERSION, len(layout.fields), page_size, count, table)], beton.HEADER
    )
    file.seek(0)
    for part in header, layout.fields, metadata:
        file.write(part.tobytes())

    width, height = metadata["image"]["width"], metadata["image"]["height"]
    with_maps = {"label_map_shape": list(layout.label_map_shape)} if layout.label_map_shape else {}
    return {
        **with_maps,
        "num_samples": count,
        "bytes": num_bytes,
        "page_size": page_size,
        "index_crc32": beton.index_crc32(header, layout.fields, metadata, crcs, allocations),
        "kept_original": kept,
        "max_width": int(width.max(initial=0)),
        "max_height": int(height.max(initial=0)),
        "median_short_side": float(np.median(np.minimum(width, height))) if count else 0.0,
        "skipped": [sample._asdict() for sample in skipped],
    }


_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent


def _estimate(indices: range) -> float:
    return _encoder.estimate(indices)


def _encode_chunk(indices: range) -> list[Encoded | Skipped]:
    return [_encoder(index) for index in indices]


@contextmanager
def _pool(encoder: Encoder, num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes; forked, so that the samples need not be pickled."""
    from evit.data import ops  # noqa: F401  (load FFCV once, before the fork)

    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (encoder,))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that encodes images died: it was killed, perhaps for want of memory "
            "(then use fewer num_workers), or the data set crashed it"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_all(
    pool: ProcessPoolExecutor, num_samples: int, num_workers: int
) -> Iterator[Encoded | Skipped]:
    """Every sample in order, with few enough chunks under way for memory to stay flat."""
    pending: deque[Future[list[Encoded | Skipped]]] = deque()
    starts = iter(range(0, num_samples, CHUNK))
    while True:
        for start in itertools.islice(starts, 2 * num_workers + 1 - len(pending)):
            chunk = range(start, min(start + CHUNK, num_samples))
            pending.append(pool.submit(_encode_chunk, chunk))
        if not pending:
            return
        yield from pending.popleft().result()


def _require_space(path: Path, estimate: float) -> None:
    free = shutil.disk_usage(path.parent).free
    if estimate > free:
        raise ValueError(
            f"{path} needs about {estimate / 1e9:.1f} GB and {path.parent} has "
            f"{free / 1e9:.1f} GB free: make room, or lower max_resolution or jpeg_quality"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Two files that become `path` and its sidecar when all went well, and vanish otherwise.

    Between the two renames the pair does not match, which check_beton refuses.
    """
    finals = path, beton.sidecar_path(path)
    temporaries = [final.with_name(f".{final.name}.{os.getpid()}.tmp") for final in finals]
    try:
        with open(temporaries[0], "wb") as first, open(temporaries[1], "wb") as second:
            yield first, second
            for file in first, second:
                file.flush()
                os.fsync(file.fileno())
        for temporary, final in zip(temporaries[::-1], finals[::-1], strict=True):
            os.replace(temporary, final)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
