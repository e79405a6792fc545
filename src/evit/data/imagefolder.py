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

from evit.data.batch import PILRandAugment
from evit.data.folders import cut_long, load_image
from evit.data.label_maps import read_label_map
from evit.data.order import EpochLoader


def evaluation_transform(img_size: int, crop_pct: float) -> Any:
    """DeiT's: short side to img_size / crop_pct, bicubic, and the centre: uint8 (3, size, size)."""
    resize = T.Resize(int(img_size / crop_pct), interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([T.RGB(), cut_long, resize, T.CenterCrop(img_size), T.PILToTensor()])


class Pictures(Dataset):
    """Images by keys (epoch, index) or (epoch, index, view). In training a random crop, a flip and
    RandAugment that depend on seed and key alone; label maps and crops are as FFCVStream's."""

    def __init__(self, samples: Any, shown: EpochLoader, maps: Any, num_classes: int):
        recipe, size, bicubic = shown.recipe, shown.img_size, T.InterpolationMode.BICUBIC
        self.samples, self.indices, self.seed = samples, shown.indices.tolist(), shown.shard.seed
        self.maps, self.num_classes = maps, num_classes
        self.map_shape = read_label_map(maps[0], num_classes).shape[2:] if maps else ()
        self.evaluated = None if shown.train else evaluation_transform(size, recipe.crop_pct)
        self.crop = T.RandomResizedCrop(size, tuple(recipe.crop_scale), interpolation=bicubic)
        self.flip, name = recipe.flip, recipe.rand_augment
        self.rand_augment = PILRandAugment(name, shown.fill) if name else None

    def __getitem__(self, key: tuple[int, ...]) -> tuple[Any, ...]:
        index = self.indices[key[1]]
        picture, label = self.samples[index]
        image = load_image(picture) if isinstance(picture, str) else Image.fromarray(picture)
        if self.evaluated:
            return self.evaluated(image), label
        seed = hash((self.seed, *key))
        torch.manual_seed(seed % 2**63)
        random.seed(seed)  # timm's RandAugment draws from these two
        np.random.seed(seed % 2**32)
        shown, *said = self.augment(image)
        if not self.maps:
            return shown, label
        found = read_label_map(self.maps[index], self.num_classes, self.map_shape)
        return shown, label, found, *said

    def augment(self, image: Image.Image) -> tuple[Tensor, ...]:
        """The pixels, where they are from (crop, mirrored), and RandAugment's warp."""
        width, height = image.size
        box = self.crop.make_params([image])
        x, y, flipped = box["left"], box["top"], bool(torch.rand(1) < self.flip)
        corners = x / width, y / height, (x + box["width"]) / width, (y + box["height"]) / height
        said = [torch.tensor([*corners, float(flipped)])]
        image = self.crop.transform(image.convert("RGB"), box)
        image = T.functional.horizontal_flip(image) if flipped else image
        if self.rand_augment:
            image, warp = self.rand_augment(image)
            said.append(torch.from_numpy(warp))
        return T.functional.pil_to_tensor(image), *said


class FolderLoader(EpochLoader):
    """Batches as of evit.data.ffcv.stream, of (path or pixels, label) pairs, bicubic as DeiT's."""

    def __init__(self, samples: Any, label_maps: Any = None, num_classes: int = 0, **shown: Any):
        super().__init__(len(samples), **shown)
        pictures = Pictures(samples, self, label_maps, num_classes)
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
