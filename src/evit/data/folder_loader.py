"""The imagefolder backend: torchvision and PIL, the published protocol to the pixel."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

from evit.data.label_maps import Shape, read_label_map
from evit.data.resumable import Resumable
from evit.data.sources import choose_samples


class EpochSampler(DistributedSampler):
    """Yields (epoch, index): a data set can then draw its augmentation from both.

    The first `start` are left out.
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, i) for i in list(super().__iter__())[self.start :])


class ExactShard(Sampler):
    """rank, rank + world, ...: every image once over all processes, none padded."""

    def __init__(self, num_samples: int, rank: int, world_size: int):
        self.indices = range(rank, num_samples, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class RandomResizedCropFlip:
    """torchvision's RandomResizedCrop, bicubic, and RandomHorizontalFlip, which say what they did.

    An image gives uint8 (3, size, size), and (5,): x0, y0, x1, y1 of the crop as shares of the
    image's width and height, and 1 where it was mirrored.
    """

    def __init__(self, size: int, scale: tuple[float, float], flip: float):
        self.crop = T.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC)
        self.flip = flip

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        box = self.crop.make_params([image])
        left, top = box["left"], box["top"]
        right, bottom = left + box["width"], top + box["height"]
        width, height = image.size
        flipped = bool(torch.rand(1) < self.flip)
        shares = left / width, top / height, right / width, bottom / height, float(flipped)
        image = self.crop.transform(image, box)
        image = T.functional.horizontal_flip(image) if flipped else image
        return T.functional.pil_to_tensor(image), torch.tensor(shares)


class SeededAugmentation(Dataset):
    """Augmented images that depend on seed, epoch and image: not on the workers.

    An item is (image, label), or (image, label, map, crop) where the data set has label maps.
    """

    def __init__(self, dataset: Any, seed: int, label_maps: Sequence[str], num_classes: int):
        self.dataset, self.seed = dataset, seed
        self.label_maps, self.num_classes = label_maps, num_classes
        self.map_shape: Shape | None = None
        if label_maps:
            first = read_label_map(label_maps[0], num_classes)
            self.map_shape = (first.shape[2], first.shape[3])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        torch.manual_seed(hash((self.seed, epoch, index)) % 2**63)
        (image, crop), label = self.dataset[index]
        if not self.label_maps:
            return image, label
        found = read_label_map(self.label_maps[index], self.num_classes, self.map_shape)
        return image, label, found, crop


class FolderLoader(Resumable, DataLoader):  # type: ignore[misc]
    """Batches uint8 (B, 3, H, W), labels (B,); in training also the label maps (B, 2, 5, h, w) of
    `label_map_shape` (h, w), where that is not None, and the crops (B, 5)."""

    label_map_shape: Shape | None = None

    def batches(self, start: int) -> Generator[Any]:
        if isinstance(self.sampler, EpochSampler):
            assert self.batch_size
            self.sampler.start = start * self.batch_size
        yield from DataLoader.__iter__(self)


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
    label_maps: Sequence[str] | None = None,
    num_classes: int = 0,
) -> FolderLoader:
    """The images of a split, bicubic as DeiT's; `label_maps` are the files of its images."""
    steps: list[Any] = [T.RGB()]
    if train:
        steps += [RandomResizedCropFlip(img_size, scale, flip)]
    else:
        resize = T.Resize(int(img_size / crop_pct), interpolation=InterpolationMode.BICUBIC)
        steps += [resize, T.CenterCrop(img_size), T.PILToTensor()]
    dataset = make_dataset(split, T.Compose(steps))
    chosen = choose_samples(len(dataset), max_samples).tolist()
    dataset = torch.utils.data.Subset(dataset, chosen)
    sampler: Sampler
    if train:
        if len(dataset) // world_size < batch_size:
            raise ValueError(
                f"{len(dataset)} training images do not fill one batch of {batch_size} on "
                f"{world_size} processes: lower recipe.batch_size"
            )
        label_maps = [label_maps[i] for i in chosen] if label_maps else []
        dataset = SeededAugmentation(dataset, seed, label_maps, num_classes)
        sampler = EpochSampler(dataset, world_size, rank, seed=seed * 100_003, drop_last=True)
    else:
        sampler = ExactShard(len(dataset), rank, world_size)
    loader = FolderLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=train,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
    loader.label_map_shape = dataset.map_shape if train else None
    return loader
