"""The data sets, as LightningDataModules: class folders, and those that torchvision downloads."""

import functools
import gzip
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torchvision
from lightning.pytorch.utilities import rank_zero_only

from evit.data import folders
from evit.data.folders import ClassFolders
from evit.data.label_maps import label_map_paths
from evit.data.module import Images
from evit.files import printable

__all__ = ["Downloaded", "FashionMNIST", "Folder", "Images", "auto"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
FILES = "FashionMNIST/raw/*-ubyte.gz (or install Debian's dataset-fashion-mnist)"
# Name, number of classes and of training images, and what to put where there is no network.
DOWNLOADS = dict(
    FashionMNIST=("fashion-mnist", 10, 60_000, FILES),
    CIFAR10=("cifar10", 10, 50_000, "cifar-10-python.tar.gz"),
    CIFAR100=("cifar100", 100, 50_000, "cifar-100-python.tar.gz"),
)


class Folder(Images):
    """Images in class folders, ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg.

    ROOT may also hold train.beton and val.beton, as src/prepare.py writes them, with or without
    label maps. A tree of another number of classes than `num_classes` is refused. Without val/ a
    share `val_fraction` of each class in train/ is held out instead, by the names of the images.
    """

    def __init__(
        self,
        root: str | Path | None,
        num_classes: int | None = None,
        val_fraction: float | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.val_fraction = val_fraction
        if not root:
            raise ValueError("no images are configured: data.root=DIR, or IMAGENET_DIR=DIR")
        self.root = Path(root).expanduser().resolve()
        self.name = printable(self.root.name)
        self._listed: dict[str, ClassFolders] = {}
        self._prepared = self._check_prepared()
        if self._prepared:
            self.beton_dir = self.root
            self.classes = self._prepared[self.splits[0]]["classes"]
        else:
            self.classes = folders.tree_classes(
                self.root, ["train"] if val_fraction else self.splits
            )
        if val_fraction and (self._prepared or folders.class_names(self.root / "val")):
            raise ValueError(f"{self.root} has validation images: leave out data.val_fraction")
        if num_classes == 1000:
            folders.require_imagenet(self.classes, self.root)
        elif num_classes not in (None, len(self.classes)):
            raise ValueError(f"{self.root} has {len(self.classes)} classes, not {num_classes}")
        self.num_classes = len(self.classes)

    def _check_prepared(self) -> dict[str, Any]:
        """The sidecars of ROOT/train.beton and ROOT/val.beton, by split; {} without such files."""
        files = {split: self.root / f"{split}.beton" for split in self.splits}
        if self.backend != "ffcv" or not all(path.is_file() for path in files.values()):
            return {}
        from evit.data.ffcv import check_beton

        found = {split: check_beton(path) for split, path in files.items()}
        first, *others = found.values()
        if any(other["classes"] != first["classes"] for other in others):
            raise ValueError(f"{self.root}: train.beton and val.beton have different classes")
        self.has_label_maps = "label_map_shape" in first
        if self.label_maps and not self.has_label_maps:
            raise ValueError(
                f"{self.root}/train.beton has no label maps in it: write it again with "
                f"python src/prepare.py source=DIR label_maps={self.label_maps}"
            )
        return found

    def dataset(self, split: str) -> ClassFolders:
        if split not in self._listed:
            share = self.val_fraction
            found = ClassFolders(self.root / ("train" if share else split), self.classes)
            if share:
                held = folders.held_out(found.samples, share)
                found.samples = [s for s in found.samples if (s in held) == (split == "val")]
            self._listed[split] = found
        return self._listed[split]

    def num_images(self, split: str) -> int:
        found = self._prepared.get(split)
        return found["num_samples"] if found else super().num_images(split)

    def map_paths(self) -> list[str] | None:
        if not self.label_maps:
            return None
        images = [path for path, _ in self.samples("train")]
        return label_map_paths(images, self.root / "train", self.label_maps)

    def identity(self) -> dict[str, Any]:
        splits = folders.splits_there(self.root, self.splits)
        images = [sample for split in splits for sample in self.samples(split)]
        found = dict(root=str(self.root), tree=folders.fingerprint(images, self.root))
        if paths := self.map_paths():
            found["label_maps"] = folders.fingerprint([(path, 0) for path in paths], self.root)
        return found


class Downloaded(Images):
    """FashionMNIST, CIFAR10 or CIFAR100, which torchvision downloads into cache_dir."""

    def __init__(self, dataset: str, **options: Any):
        super().__init__(**options)
        self.source: Any = getattr(torchvision.datasets, dataset)
        self.name, self.num_classes, self.num_train, self.files = DOWNLOADS[dataset]
        if self.label_maps:
            way = "give images of your own with data.root=DIR, or leave data.label_maps out"
            raise ValueError(f"The images of {self.name} are no files, with no label maps: {way}")

    @functools.cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        return list(self.dataset("val").classes)

    def dataset(self, split: str) -> Any:
        if self.name == "fashion-mnist":
            unpack_fashion_mnist(self.cache_dir / "FashionMNIST" / "raw")
        try:
            return self.source(str(self.cache_dir), split == "train", download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.name} cannot be downloaded ({reason}): put {self.files} into "
                f"{self.cache_dir}, or give class folders with data.root=DIR"
            ) from error

    def num_images(self, split: str) -> int:
        return self.num_train if split == "train" else 10_000


FashionMNIST = functools.partial(Downloaded, "FashionMNIST")


def unpack_fashion_mnist(raw: Path) -> None:
    """Take Fashion-MNIST from Debian's package, where it is installed."""
    if raw.is_dir() or not DEBIAN_FASHION_MNIST.is_dir():
        return
    raw.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw.parent) as folder:
        partial = Path(folder) / "raw"
        partial.mkdir()
        for packed in DEBIAN_FASHION_MNIST.glob("*-ubyte.gz"):
            (partial / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        with suppress(OSError):  # another run was faster
            partial.rename(raw)


def auto(
    root: str | Path | None = None,
    dataset: str | None = None,
    val_fraction: float | None = None,
    **options: Any,
) -> Images:
    """Choose the images: those under root; without a root those of `dataset`, or FashionMNIST."""
    if root:
        return Folder(root, val_fraction=val_fraction, **options)
    if val_fraction:
        raise ValueError(f"data.val_fraction={val_fraction} is of a folder: give data.root=DIR")
    if dataset is None:
        rank_zero_only(print)(
            "No ImageNet is configured: this is the embedded Fashion-MNIST. For images of your "
            "own: data.root=DIR, or IMAGENET_DIR=DIR, with train/ and val/ in it.",
            flush=True,
        )
    return Downloaded(dataset or "FashionMNIST", **options | dict(mode="raw"))
