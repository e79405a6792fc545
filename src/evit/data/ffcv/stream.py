"""Batches from a .beton file, for Lightning or any plain loop."""

from __future__ import annotations

import queue
from collections.abc import Generator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from evit.data.ffcv import _ffcv, decode
from evit.data.ffcv.decode import SAMPLE_BITS, SAMPLE_MASK, Crops, Decoder
from evit.data.ffcv.format import BetonError, DamagedSample, check_beton
from evit.data.order import Resumable, Shard, choose_samples, empty_batch, repeated_order
from evit.recipe import Recipe

Batch = tuple[torch.Tensor, ...]


class FFCVStream(Resumable):
    """An iterable of (images uint8 (B, 3, H, W), labels int64 (B,)), on `device` if that is CUDA.

    Training from a file with label maps, a batch goes on: maps float16 (B, 2, 5, h, w), and crops
    float32 (B, 5), x0, y0, x1, y1 as shares of the source image's width and height, and 1 where
    the crop was mirrored; and with RandAugment the maps (B, 2, 3) of its geometric operations, from
    the unit square that is shown to the crop's.

    Training: every epoch another permutation, cut into equal and disjoint parts for the processes,
    whole batches and whole optimizer steps only; with repeated augmentation
    evit.data.order.repeated_order. A batch depends on seed, epoch and rank, never on `num_workers`.
    Evaluation: sample rank, rank + world_size, ... of the file, each exactly once over all
    processes; a process without any has one empty batch.

    Args:
        num_workers: threads; -1: one per core.
        fill: the colour where a geometric operation leaves nothing.

    Raises:
        BetonError: of check_beton; or, at the next batch, a sample is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        recipe: Recipe,
        shard: Shard,
        *,
        img_size: int,
        train: bool,
        num_workers: int = -1,
        batches_ahead: int = 2,
        fill: tuple[int, ...] = (0, 0, 0),
        device: torch.device | str = "cpu",
    ) -> None:
        self.info = check_beton(path)
        self.path, self.recipe, self.shard, self.train = Path(path), recipe, shard, train
        self.img_size, self.batch_size = img_size, shard.batch_size
        self.batches_ahead, self.device = batches_ahead, torch.device(device)
        cores = _ffcv.config.NUMBA_NUM_THREADS
        self.num_workers = cores if num_workers < 0 else min(max(num_workers, 1), cores)
        self.decoder = Crops(img_size, recipe, train, fill)
        limit = recipe.max_train_images if train else recipe.max_val_images
        self.indices = choose_samples(self.info["num_samples"], limit).astype(np.uint64)
        shape = self.info.get("label_map_shape") if train else None
        self.label_map_shape = shape and tuple(shape)
        self.epoch = 0
        self._loader: Any = None
        own = len(range(shard.rank, len(self.indices), shard.world_size))
        self._length = max(-(-own // self.batch_size), 1)
        if train:
            self._length = shard.train_batches(len(self.indices), recipe)

    def __len__(self) -> int:
        return self._length

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Object on which Lightning looks for set_epoch."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def samples(self, epoch: int = 0) -> np.ndarray:
        """Numbers of the samples that this process sees in an epoch, in order."""
        return (self._order(epoch) & SAMPLE_MASK).astype(np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's entries `seed << 32 | sample`, as evit.data.ffcv.decode wants them."""
        rank, world_size, batch_size, seed = self.shard
        if not self.train:
            return self.indices[rank::world_size]
        rng, repeats = np.random.default_rng((seed, epoch)), self.recipe.repeated_augmentations
        if repeats == 1:
            order = rng.permutation(self.indices)
        else:
            seed = seed * 100_003 + epoch  # neighbouring seeds have no order in common
            order = self.indices[repeated_order(len(self.indices), repeats, seed)]
        order |= rng.integers(2**32, size=len(order), dtype=np.uint64) << SAMPLE_BITS
        return order[rank::world_size][: len(self) * batch_size]

    def batches(self, start: int) -> Generator[Batch]:
        if not self.train and self.shard.rank >= len(self.indices):
            yield empty_batch(self.img_size, self.device)
            return
        self._loader = self._loader or self._open()
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device:
            epoch = _Epoch(self._loader, self._order(self.epoch)[start * self.batch_size :])
        try:
            yield from epoch
        finally:
            epoch.close()

    def _open(self) -> Any:
        if check_beton(self.path) != self.info:
            raise BetonError(self.path, "written anew since this run began", "start it again")
        to_device = [_ffcv.ToDevice(self.device)] if self.device.type == "cuda" else []

        def pipeline(field: str, decoder: Decoder, *more: Any) -> Any:
            return _ffcv.PipelineSpec(field, decoder, [_ffcv.ToTensor(), *to_device, *more])

        images = Decoder(self.decoder.images, (self.img_size, self.img_size, 3), "u1")
        pipelines: dict[str, Any] = dict(
            image=pipeline("image", images, _ffcv.ToTorchImage()),
            label=pipeline("label", Decoder(decode.labels, (), "i8")),
            label_map=None,
        )
        if self.label_map_shape:
            maps = decode.label_maps(self.label_map_shape, self.info["num_classes"])
            pipelines["label_map"] = pipeline("label_map", maps)
            pipelines["crop"] = pipeline("image", Decoder(self.decoder.records, (5,), "f4"))
            if self.recipe.rand_augment:
                pipelines["warp"] = pipeline("image", Decoder(self.decoder.warps, (2, 3), "f4"))
        # The decoders are compiled already. FFCV would compile their callers anew in every process.
        _ffcv.Compiler.set_enabled(False)
        try:
            return _ffcv.Loader(
                str(self.path),
                self.batch_size,
                num_workers=self.num_workers,
                os_cache=True,
                pipelines=pipelines,
                batches_ahead=self.batches_ahead,
            )
        finally:
            _ffcv.Compiler.set_enabled(True)


class _Epoch(_ffcv.EpochIterator):
    """FFCV's thread of one epoch, which on its own neither reports an error nor ends when told to,
    and reuses the memory of the batches it has yielded."""

    error: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.error = error
            self.output_queue.put(None)

    def run_pipeline(self, batch: int, entries: np.ndarray, slot: int, event: Any) -> Any:
        result = super().run_pipeline(batch, entries, slot, event)
        if self.cuda_streams[slot] is not None:
            # The copy to the device must have left the buffer before the buffer is used again.
            self.cuda_streams[slot].synchronize()
        return result

    def __next__(self) -> Batch:
        item = self.output_queue.get()
        if item is not None:
            return tuple(_copy(tensor) for tensor in item[1])
        if isinstance(self.error, DamagedSample):
            raise BetonError(self.loader.fname, str(self.error)) from self.error
        if self.error is not None:
            raise RuntimeError(f"reading {self.loader.fname} failed: {self.error}") from self.error
        raise StopIteration

    def close(self) -> None:
        self.iter_ixes = iter(())
        self.terminate_event.set()
        while self.is_alive():
            with suppress(queue.Empty):
                self.output_queue.get_nowait()
            self.join(timeout=0.02)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_cuda:
        return tensor.clone()
    # PyTorch would wake all its threads for this, and they go on spinning when it is done.
    return torch.from_numpy(tensor.numpy().copy(order="K"))
