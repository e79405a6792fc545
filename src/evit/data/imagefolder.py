"""The imagefolder backend: torchvision and PIL, the published protocol to the pixel."""

import copy
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

from evit.data.folders import cut_long
from evit.data.label_maps import read_label_map
from evit.data.order import Resumable, Shard, choose_samples, empty_batch, repeated_order
from evit.data.randaugment import PILRandAugment
from evit.recipe import Recipe


class EpochSampler(DistributedSampler):
    """Yields (epoch, index), or with repeats (epoch, index, view): a data set can then draw its
    augmentation from them. The first `start` are left out."""

    start = 0

    def __init__(self, dataset: Any, shard: Shard, recipe: Recipe):
        rank, world_size, batch_size, seed = shard
        super().__init__(dataset, world_size, rank, seed=seed * 100_003, drop_last=True)
        self.repeats = recipe.repeated_augmentations
        self.num_samples = shard.train_batches(len(dataset), recipe) * batch_size
        self.total_size = self.num_samples * world_size

    def __iter__(self) -> Iterator[Any]:
        if self.repeats == 1:
            yield from ((self.epoch, i) for i in list(super().__iter__())[self.start :])
            return
        seed = self.seed + self.epoch
        order = repeated_order(len(self.dataset), self.repeats, seed)  # type: ignore[arg-type]
        places = range(self.rank, self.total_size, self.num_replicas)
        yield from ((self.epoch, int(order[i]), i) for i in places[self.start :])


class RandomResizedCropFlip:
    """torchvision's RandomResizedCrop, bicubic, RandomHorizontalFlip, and then timm's RandAugment:
    an image gives uint8 (3, size, size), and what was done, as in evit.data.ffcv.stream, its crop
    (5,) and with RandAugment a map (2, 3)."""

    def __init__(self, size: int, recipe: Recipe, fill: tuple[int, ...] = (0, 0, 0)):
        scale, name = tuple(recipe.crop_scale), recipe.rand_augment
        self.crop = T.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC)
        self.flip, self.rand_augment = recipe.flip, PILRandAugment(name, fill) if name else None

    def __call__(self, image: Image.Image) -> tuple[Tensor, ...]:
        width, height = image.size
        image = image.convert("RGB")
        box = self.crop.make_params([image])
        left, top = box["left"], box["top"]
        right, bottom = left + box["width"], top + box["height"]
        flipped = bool(torch.rand(1) < self.flip)
        shares = left / width, top / height, right / width, bottom / height, float(flipped)
        said = [torch.tensor(shares)]
        image = self.crop.transform(image, box)
        image = T.functional.horizontal_flip(image) if flipped else image
        if self.rand_augment:
            image, warp = self.rand_augment(image)
            said.append(torch.from_numpy(warp))
        return T.functional.pil_to_tensor(image), *said


def evaluation_transform(img_size: int, crop_pct: float) -> Callable[[Image.Image], Tensor]:
    """DeiT's: short side to img_size / crop_pct, bicubic, and the centre: uint8 (3, size, size)."""
    resize = T.Resize(int(img_size / crop_pct), interpolation=InterpolationMode.BICUBIC)
    return T.Compose([T.RGB(), cut_long, resize, T.CenterCrop(img_size), T.PILToTensor()])


class SeededAugmentation(Dataset):
    """Augmented images that depend on seed, epoch and image: not on the workers."""

    def __init__(self, dataset: Any, seed: int, label_maps: Sequence[str], num_classes: int):
        self.dataset, self.seed = dataset, seed
        self.label_maps, self.num_classes = label_maps, num_classes
        self.map_shape = read_label_map(label_maps[0], num_classes).shape[2:] if label_maps else ()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        index, seed = key[1], hash((self.seed, *key))
        torch.manual_seed(seed % 2**63)
        random.seed(seed)  # timm's RandAugment draws from these two
        np.random.seed(seed % 2**32)
        (image, *said), label = self.dataset[index]
        if not self.label_maps:
            return image, label
        found = read_label_map(self.label_maps[index], self.num_classes, self.map_shape)
        return image, label, found, *said


class FolderLoader(Resumable, DataLoader):  # type: ignore[misc]
    """Batches as of evit.data.ffcv.stream."""

    img_size = 0

    def __len__(self) -> int:
        return max(super().__len__(), 1)

    def batches(self, start: int) -> Generator[Any]:
        if not len(self.sampler):  # type: ignore[arg-type]
            yield empty_batch(self.img_size, torch.device("cpu"))
            return
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start = start * (self.batch_size or 1)
        try:
            yield from DataLoader.__iter__(self)
        except ValueError as error:  # PyTorch puts a worker's traceback before the message
            CombinedLoader(self).reset()  # ends the workers; garbage collection waits 5 s for them
            raise ValueError(str(error).rpartition("\nValueError: ")[2].rstrip()) from error

    def samples(self, epoch: int) -> list[int]:
        """Numbers of the training images that this process sees in an epoch, in order."""
        sampler: Any = copy.copy(self.sampler)
        sampler.epoch, sampler.start = epoch, 0
        subset: Any = self.dataset.dataset  # type: ignore[attr-defined]
        return [subset.indices[index] for _, index, *_ in sampler]


def folder_loader(
    dataset: Any,
    recipe: Recipe,
    shard: Shard,
    *,
    img_size: int,
    train: bool,
    num_workers: int,
    fill: tuple[int, ...] = (0, 0, 0),
    label_maps: Sequence[str] | None = None,
    num_classes: int = 0,
) -> FolderLoader:
    """Batches of one of torchvision's data sets, bicubic as DeiT's. It is given its transform; its
    label maps are the files `label_maps`."""
    cropped, evaluated = RandomResizedCropFlip, evaluation_transform
    dataset, crop_pct = copy.copy(dataset), recipe.crop_pct
    dataset.transform = cropped(img_size, recipe, fill) if train else evaluated(img_size, crop_pct)
    limit = recipe.max_train_images if train else recipe.max_val_images
    chosen = choose_samples(len(dataset), limit).tolist()
    dataset = torch.utils.data.Subset(dataset, chosen)
    sampler: Any = range(shard.rank, len(dataset), shard.world_size)  # every image exactly once
    if train:
        label_maps = [label_maps[i] for i in chosen] if label_maps else []
        dataset = SeededAugmentation(dataset, shard.seed, label_maps, num_classes)
        sampler = EpochSampler(dataset, shard, recipe)
    loader = FolderLoader(
        dataset,
        shard.batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=train,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
    loader.img_size = img_size
    return loader
