"""Batches from a .beton file, for Lightning or any plain loop."""

from __future__ import annotations

import faulthandler
import queue
import sys
from collections.abc import Generator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import torch

from evit.data.ffcv._ffcv import (
    Compiler,
    EpochIterator,
    Loader,
    OrderOption,
    PipelineSpec,
    ToDevice,
    ToTensor,
    ToTorchImage,
    config,
)
from evit.data.ffcv.decode import (
    SAMPLE_BITS,
    SAMPLE_MASK,
    CenterCrop,
    CropRecord,
    LabelDecoder,
    LabelMapDecoder,
    RandomResizedCropFlip,
    WarpRecord,
)
from evit.data.ffcv.draw import Augmentation
from evit.data.ffcv.format import BetonError, DamagedSample, check_beton
from evit.data.folders import choose_samples, epoch_length, repeated_order
from evit.data.resumable import Resumable, empty_batch

Batch = tuple[torch.Tensor, ...]


class FFCVStream(Resumable):
    """An iterable of (images uint8 (B, 3, H, W), labels int64 (B,)), on `device` if that is CUDA.

    Training from a file with label maps, a batch goes on: maps float16 (B, 2, 5, h, w), and crops
    float32 (B, 5), x0, y0, x1, y1 as shares of the source image's width and height, and 1 where
    the crop was mirrored; and with RandAugment the maps (B, 2, 3) of its geometric operations, from
    the unit square that is shown to the crop's.

    Training: every epoch another permutation, cut into `world_size` equal and disjoint parts, whole
    batches only, and whole optimizer steps of `batches_per_step` of them; with `repeats` above 1
    evit.data.folders.repeated_order. A batch is a function of (seed, epoch, rank), never of
    `num_workers`. Evaluation: sample rank, rank + world_size, ... of the file, each exactly once
    over all ranks; a rank without any has one empty batch.

    `num_workers` are threads (-1: one per core), `batches_ahead` the batches decoded in advance.
    `max_samples` keeps a random subset, always the same one. `crop_pct` is for evaluation; `scale`,
    `ratio`, `flip`, `rand_augment`, `color_jitter` (evit.data.ffcv.draw), `fill` (the colour where a
    geometric operation leaves nothing) and `repeats` are for training. The file is opened at the
    first batch.

    Raises what check_beton raises, and ValueError for numbers that do not fit together. A damaged
    sample is a BetonError at the next batch, any other failure while reading a RuntimeError.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        img_size: int,
        batch_size: int,
        batches_per_step: int = 1,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = -1,
        batches_ahead: int = 2,
        max_samples: int | None = None,
        crop_pct: float = 0.875,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        rand_augment: str | None = None,
        color_jitter: float = 0.0,
        fill: tuple[int, ...] = (0, 0, 0),
        repeats: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        self.info = check_beton(path)
        if numba.threading_layer() == "workqueue":
            raise ValueError(
                "numba's threads are of kind workqueue, which aborts when two loaders run at once: "
                "set NUMBA_THREADING_LAYER to tbb or omp, or unset it"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is outside 0 to {world_size - 1} (world_size - 1)")
        if batch_size < 1 or batches_ahead < 1:
            raise ValueError(f"{batch_size=} and {batches_ahead=} must be at least 1")
        if seed < 0:
            raise ValueError(f"{seed=} must not be negative")
        if not 0 < crop_pct <= 1:
            raise ValueError(f"{crop_pct=} must be in (0, 1]")
        self.path, self.batch_size, self.train = Path(path), batch_size, train
        self.img_size = img_size
        self.batches_per_step = batches_per_step
        self.seed, self.rank, self.world_size, self.repeats = seed, rank, world_size, repeats
        self.batches_ahead, self.device = batches_ahead, torch.device(device or "cpu")
        cores = config.NUMBA_NUM_THREADS
        self.num_workers = cores if num_workers < 0 else min(max(num_workers, 1), cores)
        self.augmentation = Augmentation(rand_augment, color_jitter, fill)
        self.decoder = (
            RandomResizedCropFlip(img_size, scale, ratio, flip, self.augmentation)
            if train
            else CenterCrop(img_size, crop_pct)
        )
        self.indices = choose_samples(self.info["num_samples"], max_samples).astype(np.uint64)
        shape = self.info.get("label_map_shape") if train else None
        self.label_map_shape = shape and tuple(shape)
        self.epoch = 0
        self._loader: Any = None
        if train and len(self) == 0:
            raise ValueError(
                f"{path}: {len(self.indices)} samples over {world_size} processes do not fill one "
                f"batch of {batch_size} x {batches_per_step}: use a smaller batch_size"
            )

    def __len__(self) -> int:
        if self.train:
            step = self.batch_size * self.batches_per_step
            length = epoch_length(len(self.indices), self.repeats)
            return length // self.world_size // step * self.batches_per_step
        own = len(range(self.rank, len(self.indices), self.world_size))
        return max(-(-own // self.batch_size), 1)

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for set_epoch."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the crops of iterations that begin from now on."""
        self.epoch = epoch

    def samples(self, epoch: int = 0) -> np.ndarray:
        """Numbers of the samples that this rank sees in an epoch, in order."""
        return (self._order(epoch) & SAMPLE_MASK).astype(np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's entries `seed << 32 | sample`, as evit.data.ffcv.decode wants them."""
        if not self.train:
            return self.indices[self.rank :: self.world_size]
        rng = np.random.default_rng((self.seed, epoch))
        if self.repeats == 1:
            order = rng.permutation(self.indices)
        else:
            seed = self.seed * 100_003 + epoch  # neighbouring seeds have no order in common
            order = self.indices[repeated_order(len(self.indices), self.repeats, seed)]
        order |= rng.integers(2**32, size=len(order), dtype=np.uint64) << SAMPLE_BITS
        return order[self.rank :: self.world_size][: len(self) * self.batch_size]

    def batches(self, start: int) -> Generator[Batch]:
        if not self.train and self.rank >= len(self.indices):
            yield empty_batch(self.img_size, self.device)
            return
        if self._loader is None:
            self._loader = self._open()
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device:
            epoch = _Epoch(self._loader, self._order(self.epoch)[start * self.batch_size :])
        try:
            yield from epoch
        finally:
            epoch.close()

    def _open(self) -> Loader:
        if check_beton(self.path) != self.info:
            raise BetonError(self.path, "written anew since this run began", "start it again")
        if not faulthandler.is_enabled() and sys.__stderr__:
            # Cutting a file short while it is read ends the process: it then says where.
            faulthandler.enable(sys.__stderr__)
        to_device = [ToDevice(self.device)] if self.device.type == "cuda" else []
        pipelines: dict[str, Any] = {
            "image": [self.decoder, ToTensor(), *to_device, ToTorchImage()],
            "label": [LabelDecoder(), ToTensor(), *to_device],
            "label_map": None,
        }
        if self.label_map_shape:
            pipelines["label_map"] = [LabelMapDecoder(), ToTensor(), *to_device]
            record = CropRecord(self.decoder)
            pipelines["crop"] = PipelineSpec("image", record, [ToTensor(), *to_device])
            if self.augmentation.rand_augment:
                warps = WarpRecord(self.augmentation)
                pipelines["warp"] = PipelineSpec("image", warps, [ToTensor(), *to_device])
        # The decoders are compiled already. FFCV would compile their callers anew in every process.
        Compiler.set_enabled(False)
        try:
            return Loader(
                str(self.path),
                self.batch_size,
                num_workers=self.num_workers,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                pipelines=pipelines,
                batches_ahead=self.batches_ahead,
            )
        finally:
            Compiler.set_enabled(True)


class _Epoch(EpochIterator):
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
        if item is None:
            if isinstance(self.error, DamagedSample):
                raise BetonError(self.loader.fname, str(self.error)) from self.error
            if self.error is not None:
                message = f"reading {self.loader.fname} failed: {self.error}"
                raise RuntimeError(message) from self.error
            raise StopIteration
        return tuple(_copy(tensor) for tensor in item[1])

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
