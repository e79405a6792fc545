"""Which images an epoch shows to which process, in which order, and how far it has come."""

import time
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from evit.config import Recipe


class Shard(NamedTuple):
    rank: int = 0
    world_size: int = 1
    batch_size: int = 1
    seed: int = 0


def choose_samples(num_samples: int, max_samples: int | None) -> np.ndarray:
    """Ascending indices of at most max_samples images, drawn once and for all (no seed)."""
    if max_samples is None or max_samples >= num_samples:
        return np.arange(num_samples)
    return np.sort(np.random.default_rng(0).choice(num_samples, max_samples, replace=False))


def epoch_length(num_samples: int, repeats: int) -> int:
    """Images that an epoch shows; with repeats DeiT rounds down to a multiple of 256."""
    return num_samples if repeats == 1 else num_samples // 256 * 256 or num_samples


def repeated_order(num_samples: int, repeats: int, seed: int) -> np.ndarray:
    """The samples of an epoch, shuffled, each `repeats` times in a row: DeiT's RASampler."""
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed)).numpy()
    return order.repeat(repeats)[: epoch_length(num_samples, repeats)]


@dataclass(eq=False)
class EpochLoader:
    """Batches, whose position Lightning saves and restores. Training: whole optimizer steps, parts
    of equal size for the processes. Evaluation: each image exactly once over all processes."""

    num_images: int
    recipe: Recipe
    shard: Shard
    train: bool
    img_size: int
    num_workers: int = 1
    fill: tuple[int, ...] = (0, 0, 0)  # where a geometric operation leaves nothing
    batches: ClassVar[Any]  # batches(start) generates batches start, start + 1, ... of the epoch
    epoch = position = _start = 0  # position: batches of this epoch given out so far
    waited = 0.0  # seconds that consumers have waited for batches
    batch_sampler = sampler = property(lambda self: self)  # where Lightning looks for set_epoch

    def __post_init__(self) -> None:
        limit = self.recipe.max_train_images if self.train else self.recipe.max_val_images
        self.indices = choose_samples(self.num_images, limit)  # those that are used, ascending
        n, (rank, world_size, batch_size, _) = len(self.indices), self.shard
        self._length = max(-(-len(range(rank, n, world_size)) // batch_size), 1)
        if self.train:
            per_step = max(self.recipe.batch_size // (world_size * batch_size), 1)
            length = epoch_length(n, self.recipe.repeated_augmentations)
            self._length = length // world_size // (batch_size * per_step) * per_step
            if not self._length:
                step = f"one batch of {batch_size} x {per_step} on {world_size} processes"
                raise ValueError(f"{n} training images do not fill {step}: lower recipe.batch_size")

    def order(self, epoch: int) -> np.ndarray:
        """Positions in `indices` of an epoch, dealt out to the processes one by one."""
        if not self.train:
            return np.arange(len(self.indices))
        seed = self.shard.seed * 100_003 + epoch  # neighbouring seeds have no order in common
        return repeated_order(len(self.indices), self.recipe.repeated_augmentations, seed)

    def own(self, whole: np.ndarray) -> np.ndarray:
        """The part of an epoch's values that belongs to this process."""
        found = whole[self.shard.rank :: self.shard.world_size]
        return found[: len(self) * self.shard.batch_size]

    def samples(self, epoch: int = 0) -> np.ndarray:
        """Numbers of the images that this process sees in an epoch, in order."""
        return self.own(self.indices[self.order(epoch)])

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        # As this is a generator, nothing is read before the first batch is asked for: Lightning
        # also asks for iterators that it does not use, and for others before it sets the epoch.
        self.position, self._start = self._start, 0
        batches = self.batches(self.position)
        if self.shard.rank >= len(self.indices):  # Lightning needs a batch of each process
            images = torch.zeros(0, 3, self.img_size, self.img_size, dtype=torch.uint8)
            batches = (batch for batch in [(images, torch.zeros(0, dtype=torch.int64))])
        try:
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                self.waited += time.perf_counter() - asked
                if batch is None:
                    return
                self.position += 1
                yield batch
        finally:
            batches.close()

    def state_dict(self) -> dict[str, int]:
        return dict(position=self.position, length=len(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration, and no later one, at the batch after the last one seen."""
        length, then = len(self), state["length"]
        self._start = state["position"] % then
        if self._start and length != then:
            now = f"an epoch of {then} batches for each process, which has {length} now"
            way = "use as many processes as before, checkpoints/previous.ckpt, or overwrite=true"
            raise ValueError(f"the checkpoint is from within {now}: {way}")
