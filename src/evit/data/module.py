"""The LightningDataModule: images in, uint8 batches to the device, normalised there."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor

from evit.config import Recipe
from evit.data.batch import MEAN, STD, RandAugment, fill_color, normalize
from evit.data.folders import SPLITS
from evit.data.order import Shard


class Images(L.LightningDataModule):
    """Training and validation images of one data set, streamed by FFCV or read with PIL.

    conf/data/_base.yaml says what the arguments are. `splits` are those that are used; the others
    need not be there. With label maps training batches are (images, labels, maps, crops), as
    evit.data.ffcv.stream describes them.
    """

    name: str
    classes: Any  # names, in the order of their labels
    num_classes: int
    mean, std = MEAN, STD

    def __init__(
        self,
        img_size: int,
        recipe: Recipe,
        seed: int = 0,
        cache_dir: str | Path = "data",
        backend: str = "ffcv",
        num_workers: int | None = None,
        batches_ahead: int = 2,
        splits: Sequence[str] = SPLITS,
        label_maps: str | Path | None = None,
        **write_options: Any,
    ):
        super().__init__()
        if backend not in ("ffcv", "imagefolder") or batches_ahead < 1:
            wanted = "data.backend must be ffcv or imagefolder and data.batches_ahead at least 1"
            raise ValueError(f"{wanted}, got {backend} and {batches_ahead}")
        if backend == "ffcv":
            require_ffcv()
        if recipe.rand_augment:
            RandAugment.parse(recipe.rand_augment)  # says what is wrong with it
        self.img_size, self.recipe, self.seed = img_size, recipe, seed
        self.cache_dir, self.backend = Path(cache_dir), backend
        self.write_options = dict(mode="jpg", max_resolution=640, jpeg_quality=95) | write_options
        self.num_workers, self.batches_ahead = num_workers, batches_ahead
        self.splits = tuple(splits)
        used = label_maps if "train" in self.splits else None
        self.label_maps = Path(used).expanduser().resolve() if used else None
        self.has_label_maps = bool(used)
        self._loaders: dict[str, Any] = {}

    def normalize_for(self, model: Any) -> None:
        """Normalise images as timm says that the model wants them; ImageNet's way otherwise."""
        wanted = getattr(model, "pretrained_cfg", None) or {}
        self.mean, self.std = wanted.get("mean", MEAN), wanted.get("std", STD)

    def dataset(self, split: str) -> Any:
        """One of torchvision's data sets, of a split."""
        raise NotImplementedError

    def samples(self, split: str) -> Any:
        """(image path or pixels, label) pairs of a split."""
        found = self.dataset(split)
        if hasattr(found, "samples"):
            return found.samples
        return list(zip(np.asarray(found.data), np.asarray(found.targets).tolist(), strict=True))

    def num_images(self, split: str) -> int:
        """Number of images of a split, before the recipe's limits."""
        return len(self.samples(split))

    def map_paths(self) -> list[str] | None:
        """The label map of each training image, or None."""

    def identity(self) -> dict[str, Any]:
        """Values that change whenever the content of the source changes."""
        return {}

    @functools.cached_property
    def beton_dir(self) -> Path:
        """Folder of the .beton files: one for each content of the source and way of writing."""
        from evit.data.ffcv import SIDECAR_FORMAT

        identity = self.identity() | self.write_options | dict(format=SIDECAR_FORMAT)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return self.cache_dir / f"{self.name}-{key}"

    def prepare_data(self) -> None:
        """Write the .beton files that are not there yet; in one process of each node."""
        if self.backend == "imagefolder":
            for split in self.splits:
                self.dataset(split)
            self.map_paths()
            return
        from evit.data.ffcv import check_beton
        from evit.data.ffcv.write import write_beton

        options = dict(classes=self.classes, identity=self.beton_dir.name, **self.write_options)
        options |= dict(num_workers=self.num_workers or available_cores())
        for split in self.splits:
            path = self.beton_dir / f"{split}.beton"
            if path.exists():
                check_beton(path)
                continue
            print(f"Writing {path} once, for FFCV to stream", flush=True)
            options |= dict(source=f"{self.name}/{split}")
            options |= dict(label_maps=self.map_paths() if split == "train" else None)
            write_beton(path, self.samples(split), **options)

    @property
    def local_batch_size(self) -> int:
        """Images of one batch of one process."""
        trainer, batch_size = self.trainer, self.recipe.batch_size
        shares = trainer.world_size * trainer.accumulate_grad_batches if trainer else 1
        if batch_size % shares:
            how = "(processes x accumulate_grad_batches): make it a multiple"
            raise ValueError(f"recipe.batch_size {batch_size} cannot be shared by {shares} {how}")
        return batch_size // shares

    def setup(self, stage: str | None = None) -> None:
        self._loaders = self._loaders or {split: self._loader(split) for split in self.splits}

    def describe_batch(self, epoch: int, batch: int) -> str:
        """Numbers of the images of a training batch of this process: at most 8 of them."""
        loader = self._loaders["train"]
        size = loader.shard.batch_size
        samples = loader.samples(epoch)[batch * size : (batch + 1) * size].tolist()
        file = f" of {loader.path}" if self.backend == "ffcv" else ""
        return ", ".join(map(str, samples[:8])) + ", ..." * (len(samples) > 8) + file

    def train_dataloader(self) -> Any:
        return self._loaders["train"]

    def val_dataloader(self) -> Any:
        return self._loaders["val"]

    # Lightning restores a loader's state by itself, but not if estimated_stepping_batches was
    # asked for before, as configure_optimizers does.
    def state_dict(self) -> dict[str, int]:
        return self._loaders["train"].state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._loaders["train"].load_state_dict(state_dict)

    def _loader(self, split: str) -> Any:
        trainer, train, workers = self.trainer, split == "train", self.num_workers
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        if workers is None:  # srun gives each process cores of its own; others share the machine's
            sharing = trainer and "SLURM_CPUS_PER_TASK" not in os.environ
            local = world_size // trainer.num_nodes if sharing else 1  # type: ignore[union-attr]
            workers = max(1, available_cores() // local)
        shard = Shard(rank, world_size, self.local_batch_size, self.seed)
        common: dict[str, Any] = dict(recipe=self.recipe, shard=shard, img_size=self.img_size)
        common |= dict(train=train, num_workers=workers, fill=fill_color(self.mean))
        if self.backend == "ffcv":
            from evit.data.ffcv.stream import FFCVStream

            path = self.beton_dir / f"{split}.beton"
            return FFCVStream(path, **common, batches_ahead=self.batches_ahead)
        from evit.data.imagefolder import FolderLoader

        maps = self.map_paths() if train else None
        return FolderLoader(self.dataset(split), maps, self.num_classes, **common)

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], _: int) -> Any:
        return normalize(batch[0], self.mean, self.std), *batch[1:]


def require_ffcv() -> None:
    """Raise ValueError if FFCV, or a system library that it needs, is not installed."""
    try:
        import evit.data.ffcv.decode  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}; or take data.backend=imagefolder") from error


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
