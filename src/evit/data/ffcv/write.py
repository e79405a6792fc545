"""Write .beton files: the same bytes whatever the number of processes, all of a file or none."""

from __future__ import annotations

import ctypes
import errno
import hashlib
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
from typing import Any, Literal

import numpy as np

from evit.data.ffcv import format as beton
from evit.data.ffcv.encode import Encoded, Encoder, Samples, Skipped, Stored
from evit.data.ffcv.index import Index
from evit.data.ffcv.partial import Partial, only_writer
from evit.data.label_maps import read_label_map
from evit.data.progress import shown

CHUNK = 32  # images that a process is sent at a time
ROOM = (
    "make room, lower max_resolution or jpeg_quality, or choose another folder (target=DIR of "
    "src/prepare.py, data.cache_dir=DIR of src/train.py)"
)


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

    A file that is there already, written from the same samples in the same way, is left as it is.
    Where an earlier call was stopped, this one goes on (evit.data.ffcv.partial).

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

    head = {
        **(extra or {}),
        "format": beton.OLD_FORMAT,  # that of the data, which has not changed
        "source": source,
        "classes": list(classes),
        "num_classes": len(classes),
        "mode": mode,
        "max_resolution": max_resolution,
        "jpeg_quality": jpeg_quality,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(path) as partial, _pool(encoder, num_workers) as pool:
        index = Index(len(samples), layout)
        keys, source_bytes = _identify_all(pool, len(samples))
        under_way = head | {"samples": len(samples), "layout": layout, "page_size": index.page_size}
        identity = hashlib.sha256(json.dumps(under_way).encode() + keys.tobytes()).hexdigest()
        if there := _already_there(path, identity, skip_bad):
            print(f"{path} is there already, of the same images", flush=True)
            return there
        for record in partial.recover(under_way, keys, skip_bad):
            index.add(record)
        if partial.count:
            print(f"{path}: going on after {partial.count} of {len(samples)} images", flush=True)
        _require_space(pool, path, source_bytes, index)
        encoded = _encode_all(pool, range(partial.count, len(samples)), num_workers)
        name = f"Writing {path.name}"
        encoded = shown(encoded, len(samples), name, progress, partial.count)
        try:
            _write(partial, encoded, index)
            if index.count == 0:
                raise ValueError(f"{path}: nothing to write, none of {source} is a readable image")
            sidecar = head | {
                "format": beton.SIDECAR_FORMAT,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "identity": identity,
                **index.write(partial.data),
            }
            sidecar["crc32"] = beton.sidecar_crc32(sidecar)
            partial.finish(json.dumps(sidecar, indent=1).encode())
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ValueError(f"{path.parent} is full: {ROOM}") from error
    return sidecar


def _already_there(path: Path, identity: str, skip_bad: bool) -> dict[str, Any] | None:
    """The sidecar of the very file that is to be written."""
    try:
        sidecar = beton.check_beton(path)
    except beton.BetonError:
        return None
    same = sidecar.get("identity") == identity and (skip_bad or not sidecar["skipped"])
    return sidecar if same else None


def _write(partial: Partial, encoded: Iterable[Encoded | Skipped], index: Index) -> None:
    for sample in encoded:
        if isinstance(sample, Skipped):
            index.add(sample)
            partial.add(sample)
            continue
        pieces = (sample.data, sample.label_map)[: index.layout.pieces]
        sizes = [len(piece) for piece in pieces]
        record = Stored(
            *sample[:4],
            sample.original,
            index.place(sizes),
            sizes,
            [zlib.crc32(piece) for piece in pieces],
        )
        index.add(record)
        partial.add(record, pieces)


_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent


def _estimate(indices: range) -> tuple[int, int]:
    return _encoder.estimate(indices)


def _identify_chunk(indices: range) -> np.ndarray:
    return np.array([_encoder.identify(index) for index in indices], np.uint64)


def _encode_chunk(indices: range) -> list[Encoded | Skipped]:
    return [_encoder(index) for index in indices]


@contextmanager
def _pool(encoder: Encoder, num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes; forked, so that the samples need not be pickled."""
    from evit.data.ffcv import decode  # noqa: F401

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


def _identify_all(pool: ProcessPoolExecutor, num_samples: int) -> tuple[np.ndarray, int]:
    """The keys of all samples, and the bytes of their sources."""
    chunks = [range(i, min(i + 4096, num_samples)) for i in range(0, num_samples, 4096)]
    found = np.concatenate(list(pool.map(_identify_chunk, chunks)))
    return found[:, 0], int(found[:, 1].sum())


def _encode_all(
    pool: ProcessPoolExecutor, indices: range, num_workers: int
) -> Iterator[Encoded | Skipped]:
    """Every sample in order, with few enough chunks under way for memory to stay flat."""
    pending: deque[Future[list[Encoded | Skipped]]] = deque()
    starts = iter(indices[::CHUNK])
    while True:
        for start in itertools.islice(starts, 2 * num_workers + 1 - len(pending)):
            chunk = range(start, min(start + CHUNK, indices.stop))
            pending.append(pool.submit(_encode_chunk, chunk))
        if not pending:
            return
        yield from pending.popleft().result()


def _require_space(pool: ProcessPoolExecutor, path: Path, source_bytes: int, index: Index) -> None:
    num_samples = len(index.metadata)
    some = range(0, num_samples, -(-num_samples // 64))
    stored, sources = pool.submit(_estimate, some).result()
    need = 1.05 * source_bytes * stored / max(sources, 1)
    need += num_samples * (index.layout.map_bytes + 100) - index.end
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise ValueError(
            f"{path} needs about {need / 1e9:.1f} GB more and {path.parent} has {free / 1e9:.1f} "
            f"GB free: {ROOM}"
        )
