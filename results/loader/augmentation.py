"""What augmentation costs: python results/loader/augmentation.py DIR, of DIR/train/CLASS/*.jpg

In FFCV's own threads, beside decoding, and for whole batches.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from evit.config import Recipe
from evit.data import Folder
from evit.data.batch import augment_batch, make_mixup, normalize

PLAIN = "crop and flip"
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "and RandAugment rand-m9-mstd0.5-inc1": dict(rand_augment="rand-m9-mstd0.5-inc1"),
}


def time_augmentations(
    root: str | Path,
    img_size: int = 224,
    batch_size: int = 64,
    repetitions: int = 7,
    num_workers: int = 1,
) -> list[dict[str, Any]]:
    """Time an epoch of training's uint8 batches, of ROOT/train/CLASS/*.jpg, with each augmentation;
    they take turns. An epoch of each goes first and is not counted.

    Returns:
        For each its `name`; `cpu_ms`, milliseconds of CPU time per image, of all threads, the
        median over the repetitions; `extra`, the share by which it is more than that of crop and
        flip alone in the same repetition, the median.
    """
    with tempfile.TemporaryDirectory() as cache_dir:
        loaders = {}
        for name, options in AUGMENTATIONS.items():
            data = Folder(
                root,
                img_size=img_size,
                recipe=Recipe(epochs=1, lr=1, batch_size=batch_size, **options),
                cache_dir=cache_dir,
                num_workers=num_workers,
                splits=["train"],
            )
            data.prepare_data()
            data.setup()
            loaders[name] = data.train_dataloader()
        turns = []
        for _ in range(repetitions + 1):
            turn = {}
            for name, loader in loaders.items():
                start = time.process_time()
                images = sum(len(batch[0]) for batch in loader)
                turn[name] = 1000 * (time.process_time() - start) / images
            turns.append(turn)
    rows = []
    for name in AUGMENTATIONS:
        extra = median(turn[name] / turn[PLAIN] - 1 for turn in turns[1:])
        rows.append(dict(name=name, cpu_ms=median(t[name] for t in turns[1:]), extra=extra))
    return rows


def time_batch_steps(
    img_size: int = 224, batch_size: int = 32, repetitions: int = 7
) -> list[dict[str, Any]]:
    """What is done to whole batches where the model trains, if that is one CPU thread.

    Returns:
        For each step its `name`, and `cpu_ms` per image, the median over the repetitions.
    """
    images = torch.randint(0, 256, (batch_size, 3, img_size, img_size), dtype=torch.uint8)
    labels = torch.arange(batch_size)
    options = dict(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    recipe = Recipe(epochs=1, lr=1, batch_size=batch_size, **options)
    mixup = make_mixup(recipe, 1000, batch_size)
    assert mixup is not None
    normalized = normalize(images)
    steps: dict[str, Callable[[], Any]] = {
        "normalisation": lambda: normalize(images),
        "random erasing 0.25": lambda: augment_batch(normalized, random_erasing=0.25),
        "mixup 0.8 and cutmix 1.0": lambda: mixup(normalized, labels),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for name, step in steps.items():
        times = []
        for _ in range(repetitions):
            start = time.process_time()
            for _ in range(4):
                step()
            times.append(1000 * (time.process_time() - start) / 4 / batch_size)
        rows.append(dict(name=name, cpu_ms=median(times)))
    torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    rows = time_augmentations(sys.argv[1]) + time_batch_steps() + time_batch_steps(batch_size=64)
    print(*rows, sep="\n")
