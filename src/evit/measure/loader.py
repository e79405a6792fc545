"""What it costs to load training images: FFCV here, ImageFolder and DataLoader elsewhere."""

import multiprocessing
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from evit.data.folders import SPLITS
from evit.data.module import available_cores, require_ffcv
from evit.data.order import Shard, choose_samples
from evit.recipe import Recipe

BATCH_SIZE = 64
BASELINE = "ImageFolder, PIL bilinear"


def time_loaders(
    root: str | Path,
    img_size: int = 224,
    repetitions: int = 5,
    max_images: int | None = None,
    num_workers: int | None = None,
) -> list[dict[str, Any]]:
    """Time an epoch of RandomResizedCrop and horizontal flip, uint8 batches, with every loader.

    All read the same JPEG bytes, which fit in memory: those of ROOT/train/CLASS/*.jpg, or of
    ROOT/CLASS/*.jpg, that FFCV stores as they are. The loaders take turns, so that other work on
    the machine meets all of them. An epoch of each goes first and is not counted: it compiles,
    starts the processes and fills the caches.

    Args:
        max_images: time a fixed random choice of so many images.
        num_workers: threads (FFCV) or processes (DataLoader); None: one per core.

    Returns:
        For each loader its `name`; `cpu_ms`, `cpu_ms_min` and `cpu_ms_max`, milliseconds of CPU
        time per image, of all threads and processes, the median over the repetitions and their
        range; `images_per_second` by the clock, the median; `times_faster`, by CPU time, than
        ImageFolder with PIL bilinear in the same repetition, the median; `images`, how many a
        repetition reads.

    Raises:
        ValueError: FFCV is missing, or the folder holds no JPEG to be stored as it is.
    """
    require_ffcv()
    num_workers = num_workers or available_cores()
    root = Path(root).expanduser()
    folder = ImageFolder(str(root / SPLITS[0] if (root / SPLITS[0]).is_dir() else root))
    chosen = choose_samples(len(folder), max_images)
    folder.samples = _kept([folder.samples[i] for i in chosen])
    if not folder.samples:
        raise ValueError(f"{root} holds no JPEG that FFCV stores as it is")
    with tempfile.TemporaryDirectory() as temporary:
        loaders: dict[str, Iterable[Any]] = {
            BASELINE: _image_folder(folder, img_size, T.InterpolationMode.BILINEAR, num_workers),
            "ImageFolder, PIL bicubic": _image_folder(
                folder, img_size, T.InterpolationMode.BICUBIC, num_workers
            ),
        }
        for loader in loaders.values():
            time_epoch(loader)  # processes are forked before FFCV has threads
        loaders["FFCV"] = _ffcv(folder, Path(temporary), img_size, num_workers)
        time_epoch(loaders["FFCV"])
        timings = [
            {name: time_epoch(loader) for name, loader in loaders.items()}
            for _ in range(repetitions)
        ]
    return [_summary(name, timings) for name in loaders]


def _kept(samples: list[tuple[str, int]]) -> list[tuple[str, int]]:
    from evit.data.ffcv.encode import Encoder

    encode = Encoder(max_resolution=None)
    return [(path, label) for path, label in samples if encode(path).original]


def _image_folder(
    folder: ImageFolder, img_size: int, interpolation: T.InterpolationMode, num_workers: int
) -> DataLoader:
    dataset = ImageFolder(folder.root)
    dataset.samples = folder.samples
    dataset.transform = T.Compose(
        [
            T.RandomResizedCrop(img_size, interpolation=interpolation),
            T.RandomHorizontalFlip(),
            T.PILToTensor(),
        ]
    )
    return DataLoader(
        dataset,
        min(BATCH_SIZE, len(dataset)),
        shuffle=True,
        num_workers=num_workers,
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="fork",
    )


def _ffcv(folder: ImageFolder, target: Path, img_size: int, num_workers: int) -> Iterable[Any]:
    from evit.data.ffcv.stream import FFCVStream
    from evit.data.ffcv.write import write_beton

    path = target / "train.beton"
    write_beton(
        path, folder.samples, classes=folder.classes, source=folder.root, max_resolution=None
    )
    batch_size = min(BATCH_SIZE, len(folder))
    return FFCVStream(
        path,
        Recipe(epochs=1, lr=1, batch_size=batch_size),
        Shard(batch_size=batch_size),
        img_size=img_size,
        train=True,
        num_workers=num_workers,
    )


def time_epoch(loader: Iterable[Any]) -> tuple[int, float, float]:
    """Images, seconds of CPU time and seconds by the clock of an epoch."""
    wall, cpu, images = time.perf_counter(), _cpu_seconds(), 0
    for batch in loader:
        images += len(batch[0])
    return images, _cpu_seconds() - cpu, time.perf_counter() - wall


def _cpu_seconds() -> float:
    """CPU time of this process and its children so far."""
    # The clock of another process has a number that Linux makes of its id (clock_getcpuclockid).
    children = multiprocessing.active_children()
    clocks = [~child.pid << 3 | 2 for child in children if child.pid]
    return time.process_time() + sum(time.clock_gettime(clock) for clock in clocks)


def _summary(name: str, timings: list[dict[str, tuple[int, float, float]]]) -> dict[str, Any]:
    images = timings[0][name][0]
    cpu_ms = [1000 * timing[name][1] / images for timing in timings]
    baseline_ms = [1000 * timing[BASELINE][1] / images for timing in timings]
    return {
        "name": name,
        "cpu_ms": median(cpu_ms),
        "cpu_ms_min": min(cpu_ms),
        "cpu_ms_max": max(cpu_ms),
        "images_per_second": median(images / timing[name][2] for timing in timings),
        "times_faster": median(
            theirs / ours for theirs, ours in zip(baseline_ms, cpu_ms, strict=True)
        ),
        "images": images,
    }
