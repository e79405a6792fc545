"""Write .beton files with FFCV's DatasetWriter: all of a file or nothing, and never a hang."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import json
import multiprocessing.connection
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from evit.data.ffcv import format as beton
from evit.data.ffcv._ffcv import (
    DatasetWriter,
    IntField,
    MemoryAllocator,
    NDArrayField,
    RGBImageField,
    chunks,
    worker_job_indexed_dataset,
)
from evit.data.ffcv.encode import FORK, Dataset, Encoded, Encoder, Samples
from evit.data.folders import WAY_OUT
from evit.data.label_maps import read_label_map
from evit.data.progress import shown
from evit.files import whole_file

CHUNK = 32  # images that a process takes at a time
ROOM = (
    "make room, lower max_resolution or jpeg_quality, or choose another folder (target=DIR of "
    "src/prepare.py, data.cache_dir=DIR of src/train.py)"
)


class _ImageField(RGBImageField):
    def encode(self, destination: np.ndarray, image: Encoded, malloc: Any) -> None:
        destination["mode"], destination["width"], destination["height"] = image[:3]
        destination["data_ptr"], room = malloc(len(image.data))
        room[:] = np.frombuffer(image.data, np.uint8)


class _Writer(DatasetWriter):
    """FFCV's, which fails where a worker dies, says how far it is, and leaves out what is BLANK."""

    def __init__(self, path: Path, layout: beton.Layout, page_size: int, num_workers: int) -> None:
        fields: dict[str, Any] = dict(image=_ImageField(), label=IntField())
        if layout.label_map_shape:
            fields["label_map"] = NDArrayField(np.dtype("<f2"), (2, 5, *layout.label_map_shape))
        super().__init__(str(path), fields, page_size, num_workers)
        self.layout = layout
        self.skipped: list[tuple[int, dict[str, str]]] = []

    def write(self, dataset: Dataset, skip_bad: bool) -> Iterator[None]:
        """Write the file, yielding once for each sample.

        Raises:
            ValueError: a sample is bad.
            RuntimeError: a worker died.
            OSError: the disk is full, or the like.
        """
        self.num_samples, done = len(dataset.samples), FORK.Value("Q", 0)
        self.prepare()
        work = FORK.Queue()
        for chunk in chunks([(i, i) for i in range(self.num_samples)], CHUNK):
            work.put(chunk)
        for _ in range(self.num_workers):
            work.put(None)
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        shared = work, self.metadata_sm, self.metadata_type, self.fields, allocator, done
        workers, connections = list[Any](), list[Any]()
        allocations: list[tuple[int, int, int]] = []
        try:
            for _ in range(self.num_workers):
                ours, theirs = FORK.Pipe(duplex=False)
                worker = FORK.Process(target=_work, args=(shared, theirs, dataset), daemon=True)
                worker.start()
                theirs.close()  # so that a worker's death ends what we read from it
                workers.append(worker)
                connections.append(ours)
            reported = 0
            while connections:
                ready: Any
                for ready in multiprocessing.connection.wait(connections, timeout=0.1):
                    connections.remove(ready)
                    with suppress(EOFError):
                        result = ready.recv()
                        if isinstance(result, BaseException):
                            raise result
                        allocations += result
                self._look(dataset, workers, skip_bad)
                count = done.get_obj().value  # without its lock, which a dead worker may hold
                yield from itertools.repeat(None, count - reported)
                reported = count
            for worker in workers:
                worker.join()
            self._look(dataset, workers, skip_bad)
            pages = allocator.next_page_allocated.value
            self._finish(allocations, allocator.offset + pages * self.page_size)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
            work.cancel_join_thread()
            self.metadata_sm.close()
            self.metadata_sm.unlink()

    def _look(self, dataset: Dataset, workers: list[Any], skip_bad: bool) -> None:
        while not dataset.bad.empty():
            index, name, reason, of_image = dataset.bad.get()
            if not of_image:
                raise ValueError(reason)
            if not skip_bad:
                raise ValueError(f"{name} is not a readable image ({reason}): {WAY_OUT}")
            self.skipped.append((index, dict(name=name, reason=reason)))
        if any(worker.exitcode for worker in workers):
            raise RuntimeError(
                "a process that encodes images died: it was killed, perhaps for want of memory or "
                "of room in /dev/shm (then use fewer num_workers), or the data set crashed it"
            )

    def _finish(self, allocations: list[tuple[int, int, int]], end: int) -> None:
        """Write all but the data, in the order of the samples that are not left out."""
        metadata = np.frombuffer(self.metadata_sm.buf, self.layout.metadata, self.num_samples)
        good = metadata["image"]["width"] > 0
        self.metadata = metadata[good]
        del metadata  # the shared memory can be closed
        if not good.any():
            raise ValueError("nothing to write, it has no readable image")
        table = np.array(allocations, beton.ALLOCATION)
        table = table[np.lexsort((table["ptr"], table["sample_id"]))]
        self.table = table[good[table["sample_id"]]]
        self.table["sample_id"] = (np.cumsum(good) - 1)[self.table["sample_id"]]
        numbers = beton.BETON_VERSION, len(self.fields), self.page_size, len(self.metadata), end
        self.head = np.array([numbers], beton.HEADER)
        with open(self.fname, "r+b") as file:
            if file.seek(0, os.SEEK_END) != end:  # FFCV does not look at how much it has written
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.fname)
            file.write(self.table.tobytes())
            file.seek(0)
            for part in self.head, self.layout.fields, self.metadata:
                file.write(part.tobytes())
            file.flush()
            os.fsync(file.fileno())


def _work(shared: tuple[Any, ...], connection: Any, dataset: Dataset) -> None:
    """Be a worker, which dies with its parent and sends what it has allocated, or its error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:
        worker_job_indexed_dataset(*shared, SimpleNamespace(put=connection.send), dataset)
    except Exception as error:
        connection.send(error)


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
    label_maps: Sequence[str] | None = None,
    identity: str | None = None,
) -> dict[str, Any]:
    """Write samples of (image, label) to `path`, and return the content of its sidecar.

    Args:
        samples: an image is a path, the bytes of a file, a PIL image or an array (H, W) or
            (H, W, 3) of uint8.
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
        RuntimeError: a worker process died. `path` is as it was before.
    """
    path = Path(path)
    encoder = Encoder(mode, max_resolution, jpeg_quality)
    if not len(samples):
        raise ValueError(f"{path}: nothing to write, {source} has no images")
    layout = beton.Layout()
    if label_maps is not None:
        first = read_label_map(label_maps[0], len(classes))
        layout = beton.Layout((first.shape[2], first.shape[3]))
    head: dict[str, Any] = dict(
        format=beton.SIDECAR_FORMAT,
        source=source,
        classes=list(classes),
        num_classes=len(classes),
        mode=mode,
        max_resolution=max_resolution,
        jpeg_quality=jpeg_quality,
        identity=identity,
    )
    page_size = 2**23 if len(samples) > 10_000 else 2**21  # in a small file a page is much
    while page_size < encoder.max_bytes + layout.map_bytes:
        page_size *= 2
    if num_workers < 1:
        num_workers = len(os.sched_getaffinity(0))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    with _only_writer(path.parent):
        if identity is not None and (there := _already_there(path, head, skip_bad)):
            return there
        dataset = Dataset(samples, encoder, len(classes), label_maps, layout)
        writer = _Writer(partial, layout, page_size, min(num_workers, -(-len(samples) // CHUNK)))
        steps: Iterable[None] = writer.write(dataset, skip_bad)
        if progress:
            steps = shown(steps, len(samples), f"Writing {path.name}")
        try:
            deque(steps, maxlen=0)
            sidecar = head | _describe(writer, dataset, partial)
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
    return sidecar


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process writes here; on a file system that has no locks, go on."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _already_there(path: Path, head: dict[str, Any], skip_bad: bool) -> dict[str, Any] | None:
    """The sidecar of the file that is to be written, if it is there."""
    try:
        sidecar = beton.check_beton(path)
    except beton.BetonError:
        return None
    same = all(sidecar.get(key) == value for key, value in head.items())
    if not same or sidecar["skipped"] and not skip_bad:
        return None
    print(f"{path} is there already, of the same images", flush=True)
    return sidecar


def _describe(writer: _Writer, dataset: Dataset, file: Path) -> dict[str, Any]:
    """What the sidecar says about the content of a file."""
    layout, metadata = writer.layout, writer.metadata
    shape = dict(label_map_shape=list(layout.label_map_shape)) if layout.label_map_shape else {}
    return shape | dict(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        num_samples=len(metadata),
        bytes=file.stat().st_size,
        page_size=writer.page_size,
        index_crc32=beton.index_crc32(writer.head, layout.fields, metadata, writer.table),
        kept_original=dataset.kept.value,
        skipped=[said for _, said in sorted(writer.skipped, key=lambda entry: entry[0])],
    )
