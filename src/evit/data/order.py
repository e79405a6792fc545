"""Which images an epoch shows to which process, and in which order."""

from typing import NamedTuple

import numpy as np
import torch

from evit.recipe import Recipe


class Shard(NamedTuple):
    """What one of `world_size` processes reads, `batch_size` images at a time."""

    rank: int = 0
    world_size: int = 1
    batch_size: int = 1
    seed: int = 0

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
