"""The data sets: class folders, and the embedded one."""

import functools
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from evit.data import folders as sources
from evit.data.imagenet import require_imagenet
from evit.data.label_maps import label_map_paths, require_label_maps
from evit.data.module import Images


class Folder(Images):
    """Images in class folders, ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg.

    ROOT may also hold train.beton and val.beton, as src/prepare.py writes them, with or without
    label maps.

    Args:
        root: the folder.
        num_classes: refuse a tree with another number of classes.

    Raises:
        ValueError: the tree is not as it should be; the folder is named.
    """

    def __init__(self, root: str | Path | None, num_classes: int | None = None, **options: Any):
        super().__init__(**options)
        if not root:
            raise ValueError("no images are configured: data.root=DIR, or IMAGENET_DIR=DIR")
        self.root = Path(root).expanduser().resolve()
        self.name = "".join(c if c.isprintable() else "?" for c in self.root.name)
        with sources.readable():
            self.prepared = all((self.root / f"{split}.beton").is_file() for split in self.splits)
        if self.prepared:
            from evit.data.ffcv.format import check_beton

            sidecars = [check_beton(self.root / f"{split}.beton") for split in self.splits]
            self.classes = sidecars[0]["classes"]
            if sidecars[-1]["classes"] != self.classes:
                raise ValueError(
                    f"train.beton and val.beton in {self.root} have different classes: prepare "
                    f"them again from one folder"
                )
            if self.backend == "ffcv":
                self.has_label_maps = "label_map_shape" in sidecars[0]
            if self.backend == "ffcv" and self.label_maps:
                if "label_map_shape" not in sidecars[0]:
                    raise ValueError(
                        f"{self.root}/train.beton has no label maps in it: write it again with "
                        f"python src/prepare.py source=DIR label_maps={self.label_maps}"
                    )
                rank_zero_only(print)(
                    f"The label maps are those in {self.root}/train.beton, not {self.label_maps}"
                )
        else:
            self.classes = sources.tree_classes(self.root, self.splits)
        if num_classes is not None and len(self.classes) != num_classes:
            raise ValueError(
                f"{self.root} has {len(self.classes)} classes, not {num_classes}: for a data set "
                f"of your own use data=folder data.root={self.root}"
            )
        if num_classes == 1000:
            require_imagenet(self.classes, self.root)

    def dataset(self, split: str, transform: Any) -> sources.ClassFolders:
        return sources.ClassFolders(self.root / split, self.classes, transform=transform)

    def samples(self, split: str) -> list[tuple[str, int]]:
        return self.dataset(split, None).samples

    def train_names(self) -> list[str] | None:
        if self.prepared and self.backend == "ffcv":
            return None
        return [os.path.relpath(path, self.root / "train") for path, _ in self.samples("train")]

    def num_images(self, split: str) -> int:
        if not self.prepared:
            return super().num_images(split)
        from evit.data.ffcv.format import check_beton

        return check_beton(self.root / f"{split}.beton")["num_samples"]

    def map_paths(self) -> list[str] | None:
        if not self.label_maps:
            return None
        images = [path for path, _ in self.samples("train")]
        paths = label_map_paths(images, self.root / "train", self.label_maps)
        require_label_maps(paths)
        return paths

    def identity(self) -> dict[str, Any]:
        splits = sources.splits_there(self.root, self.splits)
        images = [sample for split in splits for sample in self.samples(split)]
        found = dict(root=str(self.root), tree=sources.fingerprint(images, self.root))
        if paths := self.map_paths():
            maps = sources.fingerprint([(path, 0) for path in paths], self.root)
            found |= dict(label_maps=maps)
        return found

    @functools.cached_property
    def beton_dir(self) -> Path:
        return self.root if self.prepared else super().beton_dir


class FashionMNIST(Images):
    """The embedded data set: 60,000 + 10,000 gray images of 28 px in 10 classes."""

    name = "fashion-mnist"
    classes = sources.FASHION_MNIST_CLASSES

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.label_maps:
            raise ValueError(
                "Fashion-MNIST's images are no files, so they have no label maps: give images of "
                "your own with data.root=DIR, or leave data.label_maps out"
            )

    def dataset(self, split: str, transform: Any) -> Any:
        return sources.fashion_mnist(self.cache_dir, split == "train", transform)

    def samples(self, split: str) -> sources.Pixels:
        return sources.Pixels(self.dataset(split, None))

    def num_images(self, split: str) -> int:
        return 60_000 if split == "train" else 10_000

    def identity(self) -> dict[str, Any]:
        return {}


def auto(root: str | Path | None = None, **options: Any) -> Images:
    """The images under root; without a root the embedded data set, which is said."""
    if root:
        return Folder(root, **options)
    rank_zero_only(print)(
        "No ImageNet is configured: this is the embedded Fashion-MNIST. For images of your own: "
        "data.root=DIR, or IMAGENET_DIR=DIR, with train/ and val/ in it.",
        flush=True,
    )
    return FashionMNIST(**options | dict(mode="raw"))
