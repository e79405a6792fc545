"""What augmentation costs on top of decoding, in FFCV's own threads."""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from evit.data import Folder
from evit.measure.loader import BATCH_SIZE, time_epoch

PLAIN = "crop and flip"
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "and RandAugment rand-m9-mstd0.5-inc1": dict(rand_augment="rand-m9-mstd0.5-inc1"),
    "and color jitter 0.4": dict(color_jitter=0.4),
}


def time_augmentations(
    root: str | Path, img_size: int = 224, repetitions: int = 7, num_workers: int = 1
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
                batch_size=BATCH_SIZE,
                cache_dir=cache_dir,
                num_workers=num_workers,
                splits=["train"],
                **options,
            )
            data.prepare_data()
            data.setup()
            loaders[name] = data.train_dataloader()
        turns = []
        for _ in range(repetitions + 1):
            turn = {}
            for name, loader in loaders.items():
                images, cpu_seconds, _ = time_epoch(loader)
                turn[name] = 1000 * cpu_seconds / images
            turns.append(turn)
    rows = []
    for name in AUGMENTATIONS:
        extra = median(turn[name] / turn[PLAIN] - 1 for turn in turns[1:])
        rows.append(dict(name=name, cpu_ms=median(t[name] for t in turns[1:]), extra=extra))
    return rows
