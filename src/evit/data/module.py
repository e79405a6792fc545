"""The data sets, as LightningDataModules: class folders, and those that torchvision downloads."""

import functools
import gzip
import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torchvision
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from evit.config import Recipe
from evit.data import folders
from evit.data.batch import MEAN, STD, normalize, parse_rand_augment
from evit.data.folders import SPLITS
from evit.data.label_maps import label_map_paths
from evit.data.order import Shard
from evit.files import printable

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
FILES = "FashionMNIST/raw/*-ubyte.gz (or install Debian's dataset-fashion-mnist)"
# Name, number of classes and of training images, and what to put where there is no network.
DOWNLOADS = dict(
    FashionMNIST=("fashion-mnist", 10, 60_000, FILES),
    CIFAR10=("cifar10", 10, 50_000, "cifar-10-python.tar.gz"),
    CIFAR100=("cifar100", 100, 50_000, "cifar-100-python.tar.gz"),
)


class Images(L.LightningDataModule):
    """Training and validation images of one data set, streamed by FFCV or read with PIL.
    conf/data/_base.yaml says what the arguments are. `splits` need not be more than are used."""

    name: str
    root: Path  # of class folders
    classes: Any  # names, in the order of their labels
    num_classes: int
    samples: Any  # samples(split): its (image path or pixels, label) pairs
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
        splits: Any = SPLITS,
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
            parse_rand_augment(recipe.rand_augment)  # says what is wrong with it
        self.img_size, self.recipe, self.seed = img_size, recipe, seed
        self.cache_dir, self.backend = Path(cache_dir), backend
        self.write_options = dict(mode="jpg", max_resolution=640, jpeg_quality=95) | write_options
        self.num_workers, self.batches_ahead = num_workers, batches_ahead
        self.splits = tuple(splits)
        used = label_maps if "train" in self.splits else None
        self.label_maps = Path(used).expanduser().resolve() if used else None
        self.has_label_maps = bool(used)
        self.counts: dict[str, int] = {}  # of images, where they are known beforehand
        self._loaders: dict[str, Any] = {}

    def normalize_for(self, model: Any) -> None:
        """Normalise images as timm says that the model wants them; ImageNet's way otherwise."""
        wanted = getattr(model, "pretrained_cfg", None) or {}
        self.mean, self.std = wanted.get("mean", MEAN), wanted.get("std", STD)

    def num_images(self, split: str) -> int:
        return self.counts.get(split) or len(self.samples(split))

    def map_paths(self, split: str) -> list[str] | None:
        if not self.label_maps or split != "train":
            return None
        return label_map_paths(self.samples(split), self.root / split, self.label_maps)

    def identity(self) -> dict[str, Any]:
        return {}  # values that change whenever the content of the source changes

    @functools.cached_property
    def beton_dir(self) -> Path:
        """Folder of the .beton files: one for each content of the source and way of writing."""
        facts = self.identity() | self.write_options | dict(format=require_ffcv().SIDECAR_FORMAT)
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        return self.cache_dir / f"{self.name}-{key}"

    def prepare_data(self) -> None:
        """Download what is missing and write the .beton files; in one process of each node."""
        for split in self.splits:
            if self.backend == "imagefolder":
                self.samples(split)
            elif (path := self.beton_dir / f"{split}.beton").exists():
                require_ffcv().open_beton(path)
            else:
                from evit.data.ffcv.write import write_beton

                print(f"Writing {path} once, for FFCV to stream", flush=True)
                how: Any = dict(classes=self.classes, label_maps=self.map_paths(split))
                how |= dict(identity=self.beton_dir.name, source=f"{self.name}/{split}")
                how |= dict(num_workers=self.num_workers) | self.write_options
                write_beton(path, self.samples(split), **how)

    @property
    def local_batch_size(self) -> int:
        """Images of one batch of one process."""
        trainer, size = self.trainer, self.recipe.batch_size
        shares = trainer.world_size * trainer.accumulate_grad_batches if trainer else 1
        if size % shares:
            way = f"must be a multiple of processes x accumulate_grad_batches, {shares}"
            raise ValueError(f"recipe.batch_size={size} {way}")
        return size // shares

    def setup(self, stage: str | None = None) -> None:
        self._loaders = self._loaders or {split: self._loader(split) for split in self.splits}

    def describe_batch(self, epoch: int, batch: int) -> str:
        """Numbers of the images of a training batch of this process, at most 8."""
        loader, size = self._loaders["train"], self.local_batch_size
        samples = loader.samples(epoch)[batch * size :][:size].tolist()
        file = f" of {loader.path}" if self.backend == "ffcv" else ""
        return ", ".join(map(str, samples[:8])) + ", ..." * (len(samples) > 8) + file

    def train_dataloader(self) -> Any:
        return self._loaders["train"]

    def val_dataloader(self) -> Any:
        return self._loaders["val"]

    # Lightning restores no loader's state once estimated_stepping_batches was asked for.
    def state_dict(self) -> dict[str, int]:
        return self._loaders["train"].state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._loaders["train"].load_state_dict(state_dict)

    def _loader(self, split: str) -> Any:
        trainer, workers = self.trainer, self.num_workers
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        if workers is None:  # srun gives each process cores of its own; others share the machine's
            sharing = trainer and "SLURM_CPUS_PER_TASK" not in os.environ
            local = world_size // trainer.num_nodes if sharing else 1  # type: ignore[union-attr]
            workers = max(1, len(os.sched_getaffinity(0)) // local)
        shard = Shard(rank, world_size, self.local_batch_size, self.seed)
        fill = tuple(min(255, round(255 * share)) for share in self.mean)  # as timm's
        common: dict[str, Any] = dict(recipe=self.recipe, shard=shard, img_size=self.img_size)
        common |= dict(train=split == "train", num_workers=workers, fill=fill)
        if self.backend == "ffcv":
            from evit.data.ffcv.stream import FFCVStream

            return FFCVStream(self.beton_dir / f"{split}.beton", self.batches_ahead, **common)
        from evit.data.imagefolder import FolderLoader

        return FolderLoader(self.samples(split), self.map_paths(split), self.num_classes, **common)

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], _: int) -> Any:
        return normalize(batch[0], self.mean, self.std), *batch[1:]


class Folder(Images):
    """Images in ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, or ROOT/train.beton and val.beton.
    Without val/ `val_fraction` of each class in train/ is held out, by the images' names."""

    def __init__(self, root: Any, num_classes: Any = None, val_fraction: Any = None, **more: Any):
        super().__init__(**more)
        if not root:
            raise ValueError("no images are configured: data.root=DIR, or IMAGENET_DIR=DIR")
        self.root, self.val_fraction = Path(root).expanduser().resolve(), val_fraction
        self.name = printable(self.root.name)
        self._listed: dict[str, list[tuple[str, int]]] = {}
        files = [self.root / f"{split}.beton" for split in self.splits]
        prepared = self.backend == "ffcv" and all(path.is_file() for path in files)
        if prepared:
            found = [require_ffcv().open_beton(path)[0] for path in files]
            self.counts = {
                s: info["num_samples"] for s, info in zip(self.splits, found, strict=True)
            }
            self.beton_dir, self.classes = self.root, found[0]["classes"]
            self.has_label_maps = "label_map_shape" in found[0]
            if found[-1]["classes"] != self.classes:
                raise ValueError(f"{self.root}: train.beton and val.beton have different classes")
            if self.label_maps and not self.has_label_maps:
                way = f"write it again with src/prepare.py label_maps={self.label_maps}"
                raise ValueError(f"{self.root}/train.beton has no label maps: {way}")
        else:
            needed = ["train"] if val_fraction else self.splits
            self.classes = folders.tree_classes(self.root, needed)
        if val_fraction and (prepared or folders.class_names(self.root / "val")):
            raise ValueError(f"{self.root} has validation images: leave out data.val_fraction")
        self.num_classes = len(self.classes)
        if num_classes == 1000:
            folders.require_imagenet(self.classes, self.root)
        elif num_classes not in (None, self.num_classes):
            raise ValueError(f"{self.root} has {self.num_classes} classes, not {num_classes}")

    def samples(self, split: str) -> list[tuple[str, int]]:
        if split not in self._listed:
            share = self.val_fraction
            found = folders.class_samples(self.root / ("train" if share else split), self.classes)
            if share:
                held = folders.held_out(found, share)
                found = [sample for sample in found if (sample in held) == (split == "val")]
            self._listed[split] = found
        return self._listed[split]

    def identity(self) -> dict[str, Any]:
        there = [s for s in SPLITS if s in self.splits or folders.class_names(self.root / s)]
        images = [sample for split in there for sample in self.samples(split)]
        found = dict(root=str(self.root), tree=folders.fingerprint(images, self.root))
        if paths := self.map_paths("train"):
            found["label_maps"] = folders.fingerprint([(path, 0) for path in paths], self.root)
        return found


class Downloaded(Images):
    """FashionMNIST, CIFAR10 or CIFAR100, which torchvision downloads into cache_dir."""

    def __init__(self, dataset: str, **options: Any):
        super().__init__(**options)
        self.source: Any = getattr(torchvision.datasets, dataset)
        self.name, self.num_classes, train, self.files = DOWNLOADS[dataset]
        self.counts = dict(train=train, val=10_000)
        if self.label_maps:
            raise ValueError(f"{self.name} has no label maps: give images of yours, data.root=DIR")

    @functools.cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        return list(self.dataset("val").classes)

    def dataset(self, split: str) -> Any:
        raw = self.cache_dir / "FashionMNIST" / "raw"
        if self.name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir() and not raw.is_dir():
            unpack_fashion_mnist(raw)
        try:
            return self.source(str(self.cache_dir), split == "train", download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            way = f"put {self.files} into {self.cache_dir}, or give images with data.root=DIR"
            raise ValueError(f"{self.name} cannot be downloaded ({reason}): {way}") from error

    def samples(self, split: str) -> Any:
        found = self.dataset(split)
        return list(zip(np.asarray(found.data), np.asarray(found.targets).tolist(), strict=True))


FashionMNIST = functools.partial(Downloaded, "FashionMNIST")


def unpack_fashion_mnist(raw: Path) -> None:
    raw.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw.parent) as folder:
        (partial := Path(folder) / "raw").mkdir()
        for packed in DEBIAN_FASHION_MNIST.glob("*-ubyte.gz"):
            (partial / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        with suppress(OSError):  # another run was faster
            partial.rename(raw)


def auto(root: str | Path | None = None, dataset: str | None = None, **options: Any) -> Images:
    """Choose the images: those under root; without a root those of `dataset`, or FashionMNIST."""
    if root:
        return Folder(root, **options)
    if share := options.pop("val_fraction", None):
        raise ValueError(f"data.val_fraction={share} is of a folder: give data.root=DIR")
    if dataset is None:
        way = "For images of your own: data.root=DIR, or IMAGENET_DIR=DIR, with train/ and val/"
        rank_zero_only(print)(f"This is the embedded Fashion-MNIST. {way}", flush=True)
    return Downloaded(dataset or "FashionMNIST", **options | dict(mode="raw"))


def require_ffcv() -> Any:
    """evit.data.ffcv; ValueError if FFCV, or a system library that it needs, is not installed."""
    try:
        import evit.data.ffcv.decode
    except ImportError as error:
        raise ValueError(f"{error}; or take data.backend=imagefolder") from error
    return evit.data.ffcv
