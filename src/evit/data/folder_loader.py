"""The imagefolder backend: torchvision and PIL, the published protocol to the pixel."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

from evit.data.sources import choose_samples


class EpochSampler(DistributedSampler):
    """Yields (epoch, index): a data set can then draw its augmentation from both."""

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, i) for i in super().__iter__())


class ExactShard(Sampler):
    """rank, rank + world, ...: every image once over all processes, none padded."""

    def __init__(self, num_samples: int, rank: int, world_size: int):
        self.indices = range(rank, num_samples, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class SeededAugmentation(Dataset):
    """A data set whose random transforms depend on seed, epoch and image: not on the workers."""

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        torch.manual_seed(hash((self.seed, epoch, index)) % 2**63)
        return self.dataset[index]


def folder_loader(
    make_dataset: Callable[[str, Any], Any],
    split: str,
    *,
    img_size: int,
    batch_size: int,
    train: bool,
    seed: int,
    rank: int,
    world_size: int,
    num_workers: int,
    max_samples: int | None,
    scale: tuple[float, float],
    flip: float,
    crop_pct: float,
) -> DataLoader:
    """A DataLoader of (uint8 images (B, 3, H, W), labels (B,)), bicubic as DeiT's."""
    bicubic = InterpolationMode.BICUBIC
    steps: list[Any] = [T.RGB()]
    if train:
        steps += [T.RandomResizedCrop(img_size, scale, interpolation=bicubic)]
        steps += [T.RandomHorizontalFlip(flip)]
    else:
        steps += [T.Resize(int(img_size / crop_pct), interpolation=bicubic), T.CenterCrop(img_size)]
    dataset = make_dataset(split, T.Compose([*steps, T.PILToTensor()]))
    dataset = torch.utils.data.Subset(dataset, choose_samples(len(dataset), max_samples).tolist())
    sampler: Sampler
    if train:
        if len(dataset) // world_size < batch_size:
            raise ValueError(
                f"{len(dataset)} training images do not fill one batch of {batch_size} on "
                f"{world_size} processes: lower recipe.batch_size"
            )
        dataset = SeededAugmentation(dataset, seed)
        sampler = EpochSampler(dataset, world_size, rank, seed=seed * 100_003, drop_last=True)
    else:
        sampler = ExactShard(len(dataset), rank, world_size)
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=train,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
