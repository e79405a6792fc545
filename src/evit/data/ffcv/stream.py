"""Batches from a .beton file, for Lightning or any plain loop."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from evit.data.batch import parse_rand_augment, source_of, warp_of
from evit.data.ffcv import BetonError, augment, config, decode, open_beton
from evit.data.order import EpochLoader


class FFCVStream(EpochLoader):
    """Batches (images uint8 (B, 3, H, W), labels int64 (B,)), for any number of threads the same.
    With label maps, training batches also have these, float16 (B, 2, 5, h, w), and crops, float32
    (B, 5): x0, y0, x1, y1 as shares of the image's sides, and 1 where the crop was mirrored; with
    RandAugment affine maps (B, 2, 3), from the unit square that is shown to that of the crop."""

    def __init__(self, path: str | Path, batches_ahead: int = 2, **shown: Any) -> None:
        self.path, self.batches_ahead = Path(path), batches_ahead
        self.info, self.content, self.metadata, self.sizes = open_beton(path)
        super().__init__(self.info["num_samples"], **shown)
        self.num_workers = min(max(self.num_workers, 1), config.NUMBA_NUM_THREADS)
        self.label_map_shape = tuple(self.info.get("label_map_shape", ())) if self.train else ()
        name = self.recipe.rand_augment if self.train else None
        self.rand_augment: Any = parse_rand_augment(name) if name else None

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng, order = np.random.default_rng((self.shard.seed, epoch)), super().order(epoch)
        if self.train and self.recipe.repeated_augmentations == 1:
            order = rng.permutation(len(order))
        return order, rng.integers(2**32, size=len(order), dtype=np.uint64).astype(np.uint32)

    def order(self, epoch: int) -> np.ndarray:
        return self.draw(epoch)[0]

    def batches(self, start: int) -> Any:
        order, seeds = map(self.own, self.draw(self.epoch))
        samples, size, pool = self.indices[order], self.shard.batch_size, ThreadPoolExecutor(1)
        parts = (slice(i, i + size) for i in range(start * size, len(samples), size))
        begun = (pool.submit(self.read, samples[part], seeds[part]) for part in parts)
        ahead = deque(islice(begun, self.batches_ahead + 1))
        try:
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(islice(begun, 1))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def read(self, samples: np.ndarray, seeds: np.ndarray) -> tuple[torch.Tensor, ...]:
        numba.set_num_threads(self.num_workers)
        rows, size = self.metadata[samples], (self.img_size, self.img_size)
        found, labels, *map_starts = (rows[name] for name in rows.dtype.names)
        heights, widths = (found[side].astype(np.int64) for side in ("height", "width"))
        if self.train:
            scale, flip = np.array(self.recipe.crop_scale, float), float(self.recipe.flip)
            boxes, flips = decode.random_crops(heights, widths, seeds, scale, decode.RATIO, flip)
        else:
            boxes = decode.center_crops(heights, widths, self.img_size, self.recipe.crop_pct)
            flips = np.zeros(len(samples), np.bool_)
        shape, pin = (len(samples), *size, 3), torch.cuda.is_available()  # for copies to a GPU
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        pixels, sizes = images.numpy(), self.sizes[samples]
        status = decode.crop_batch(self.content, found, sizes, boxes, flips, self.train, pixels)
        self.require(status == 0, samples, "JPEG")
        if self.rand_augment:
            salted = seeds ^ np.uint32(0x9E3779B9)  # crops are drawn from the seeds themselves
            operations, arguments = augment.draw(salted, *self.rand_augment)
            pairs = zip(operations.tolist(), arguments.tolist(), strict=True)
            steps = [list(zip(*pair, strict=True)) for pair in pairs]  # of each image
            affines = np.array([[source_of(*step, *size) for step in image] for image in steps])
            augment.augment_batch(pixels, operations, arguments, affines, np.array(self.fill))
        more = [labels]
        if self.label_map_shape:
            top, left, height, width = boxes.T
            ends = (left + width) / widths, (top + height) / heights
            crops = np.stack([left / widths, top / heights, *ends, flips], 1).astype(np.float32)
            more += [self.label_maps(samples, map_starts[0]), crops]
            if self.rand_augment:
                more.append(np.stack([warp_of(image) for image in steps]))
        batch = [torch.from_numpy(np.ascontiguousarray(values)) for values in more]
        return images.permute(0, 3, 1, 2), *(t.pin_memory() if pin else t for t in batch)

    def label_maps(self, samples: np.ndarray, starts: np.ndarray) -> np.ndarray:
        maps = np.empty((len(samples), 2, 5, *self.label_map_shape), "<f2")
        for start, rest in zip(starts, maps, strict=True):
            rest[:] = self.content[start:][: rest.nbytes].view("<f2").reshape(rest.shape)
        logits, ids = maps[:, 0], maps[:, 1]
        good = np.isfinite(logits) & (ids >= 0) & (ids < self.info["num_classes"])
        self.require(good.all((1, 2, 3)), samples, "label map")
        return maps

    def require(self, good: np.ndarray, samples: np.ndarray, what: str) -> None:
        if not good.all():
            raise BetonError(self.path, f"the {what} of sample {samples[good.argmin()]} is damaged")
