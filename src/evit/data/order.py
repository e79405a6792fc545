"""Which images an epoch shows to which process, in which order, and how far it has come."""

import time
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from evit.recipe import Recipe


class Shard(NamedTuple):
    """What one of `world_size` processes reads, `batch_size` images at a time."""

    rank: int
    world_size: int
    batch_size: int
    seed: int

    def train_batches(self, num_images: int, recipe: Recipe) -> int:
        """Batches of an epoch, the same for every process: whole optimizer steps only."""
        per_step = max(recipe.batch_size // (self.world_size * self.batch_size), 1)
        length = epoch_length(num_images, recipe.repeated_augmentations)
        steps = length // self.world_size // (self.batch_size * per_step)
        if not steps:
            raise ValueError(
                f"{num_images} training images do not fill one batch of {self.batch_size} x "
                f"{per_step} on {self.world_size} processes: lower recipe.batch_size"
            )
        return steps * per_step


def choose_samples(num_samples: int, max_samples: int | None) -> np.ndarray:
    """Ascending indices of at most max_samples images, drawn once and for all (no seed)."""
    if max_samples is None or max_samples >= num_samples:
        return np.arange(num_samples)
    return np.sort(np.random.default_rng(0).choice(num_samples, max_samples, replace=False))


def epoch_length(num_samples: int, repeats: int) -> int:
    """Images that an epoch shows; with repeats DeiT rounds down to a multiple of 256."""
    return num_samples if repeats == 1 else num_samples // 256 * 256 or num_samples


def repeated_order(num_samples: int, repeats: int, seed: int) -> np.ndarray:
    """The samples of an epoch, shuffled, each `repeats` times in a row, to be dealt out to the
    processes one by one. An epoch shows a part of the samples, not more images than without.

    For 3 repeats and the epoch as seed it is DeiT's RASampler (facebookresearch/deit, samplers.py).
    """
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed)).numpy()
    return order.repeat(repeats)[: epoch_length(num_samples, repeats)]


def empty_batch(img_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What a process evaluates that has no image of its own: Lightning needs a batch of each."""
    images = torch.zeros(0, 3, img_size, img_size, dtype=torch.uint8, device=device)
    return images, torch.zeros(0, dtype=torch.int64, device=device)


class Resumable:
    """An iterable of batches whose position Lightning saves in checkpoints, and restores.

    position is the number of batches of this epoch that have been given out, waited the seconds
    that whoever asked for them has waited, since the loader was made.
    """

    position = 0
    waited = 0.0
    _start = 0

    def batches(self, start: int) -> Generator[Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        # As this is a generator, nothing is read before the first batch is asked for: Lightning
        # also asks for iterators that it does not use, and for others before it sets the epoch.
        self.position, self._start = self._start, 0
        batches = self.batches(self.position)
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
        return dict(position=self.position, length=len(self))  # type: ignore[arg-type]

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration, and no later one, at the batch after the last one seen."""
        length, then = self.state_dict()["length"], state["length"]
        self._start = state["position"] % then
        if self._start and length != then:
            raise ValueError(
                f"the checkpoint is from within an epoch of {then} batches for each process, which "
                f"has {length} now: go on with as many processes as before, or from the end of an "
                f"epoch (checkpoints/previous.ckpt may be one), or overwrite=true"
            )
