"""The imagefolder backend: torchvision and PIL, the published protocol to the pixel."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as T

from evit.config import Recipe
from evit.data.batch import PILRandAugment
from evit.data.folders import cut_long, load_image
from evit.data.label_maps import read_label_map
from evit.data.order import EpochLoader


class RandomResizedCropFlip:
    """torchvision's RandomResizedCrop, a flip, timm's RandAugment; crop and map as FFCVStream's."""

    def __init__(self, size: int, recipe: Recipe, fill: tuple[int, ...]):
        scale, name = tuple(recipe.crop_scale), recipe.rand_augment
        self.crop = T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC)
        self.flip, self.rand_augment = recipe.flip, PILRandAugment(name, fill) if name else None

    def __call__(self, image: Image.Image) -> tuple[Tensor, ...]:
        width, height = image.size
        image = image.convert("RGB")
        box = self.crop.make_params([image])
        x, y, flipped = box["left"], box["top"], bool(torch.rand(1) < self.flip)
        corners = x / width, y / height, (x + box["width"]) / width, (y + box["height"]) / height
        said = [torch.tensor([*corners, float(flipped)])]
        image = self.crop.transform(image, box)
        image = T.functional.horizontal_flip(image) if flipped else image
        if self.rand_augment:
            image, warp = self.rand_augment(image)
            said.append(torch.from_numpy(warp))
        return T.functional.pil_to_tensor(image), *said


def evaluation_transform(img_size: int, crop_pct: float) -> Any:
    """DeiT's: short side to img_size / crop_pct, bicubic, and the centre: uint8 (3, size, size)."""
    resize = T.Resize(int(img_size / crop_pct), interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([T.RGB(), cut_long, resize, T.CenterCrop(img_size), T.PILToTensor()])


class Pictures(Dataset):
    """Images with their label maps, by keys (epoch, index) or (epoch, index, view). Where there is
    a seed, they depend on it and the key alone, not on the worker."""

    def __init__(self, samples: Any, indices: Any, show: Any, seed: Any, maps: Any, classes: int):
        self.samples, self.indices, self.show, self.seed = samples, indices, show, seed
        self.maps, self.num_classes = maps, classes
        self.map_shape = read_label_map(maps[0], classes).shape[2:] if maps else ()

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Any, ...]:
        index = self.indices[key[1]]
        picture, label = self.samples[index]
        image = load_image(picture) if isinstance(picture, str) else Image.fromarray(picture)
        if self.seed is None:
            return self.show(image), label
        seed = hash((self.seed, *key))
        torch.manual_seed(seed % 2**63)
        random.seed(seed)  # timm's RandAugment draws from these two
        np.random.seed(seed % 2**32)
        shown, *said = self.show(image)
        if not self.maps:
            return shown, label
        found = read_label_map(self.maps[index], self.num_classes, self.map_shape)
        return shown, label, found, *said


class FolderLoader(EpochLoader):
    """Batches as of evit.data.ffcv.stream, of (path or pixels, label) pairs, bicubic as DeiT's."""

    def __init__(self, samples: Any, label_maps: Any = None, num_classes: int = 0, **shown: Any):
        super().__init__(len(samples), **shown)
        show, seed = evaluation_transform(self.img_size, self.recipe.crop_pct), None
        if self.train:
            show = RandomResizedCropFlip(self.img_size, self.recipe, self.fill)
            seed = self.shard.seed
        pictures = Pictures(samples, self.indices.tolist(), show, seed, label_maps, num_classes)
        self.keys: list[list[int]] = []  # of an epoch
        how: Any = dict(sampler=self.keys, pin_memory=torch.cuda.is_available())
        how |= dict(num_workers=self.num_workers, persistent_workers=self.num_workers > 0)
        self.loader: DataLoader = DataLoader(pictures, self.shard.batch_size, **how)

    def batches(self, start: int) -> Any:
        order, views = self.order(self.epoch), self.recipe.repeated_augmentations > 1
        keys = np.stack([np.full_like(order, self.epoch), order, np.arange(len(order))], 1)
        self.keys[:] = self.own(keys)[start * self.shard.batch_size :, : 2 + views].tolist()
        try:
            yield from self.loader
        except ValueError as error:  # PyTorch puts a worker's traceback before the message
            CombinedLoader(self.loader).reset()  # or garbage collection waits 5 s for the workers
            raise ValueError(str(error).rpartition("\nValueError: ")[2].rstrip()) from error
