"""Where images come from: trees of class folders, and the embedded data set."""

import gzip
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

SPLITS = ("train", "val")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
FASHION_MNIST_CLASSES = torchvision.datasets.FashionMNIST.classes
WAY_OUT = (
    "remove or replace it, or leave such images out: python src/prepare.py source=DIR skip_bad=true"
)


@contextmanager
def readable() -> Iterator[None]:
    """What the system refuses becomes a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{error.filename} cannot be read ({error.strerror}): make it readable, or remove it"
        ) from error


@readable()
def class_names(folder: Path) -> list[str]:
    """Names of the class folders in a folder, sorted, hidden ones left out."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def splits_there(root: Path, needed: Sequence[str]) -> list[str]:
    """The splits that are needed, and those that have class folders in ROOT beside them."""
    return [s for s in SPLITS if s in needed or (root / s).is_dir() and class_names(root / s)]


@readable()
def tree_classes(root: str | Path, needed: Sequence[str] = SPLITS) -> list[str]:
    """The classes of ROOT/train, once ROOT is seen to be a tree of train/CLASS and val/CLASS.

    Where val/ alone is needed and there is no train/, the classes are those of val/.

    Raises:
        ValueError: a folder is missing or empty, or val/ has a class that train/ lacks.
    """
    root = Path(root).expanduser()
    layout = "expected " + " and ".join(f"{root}/{split}/CLASS/*.jpg" for split in needed)
    if any(root.glob("ILSVRC2012_*")) or any(root.glob("val/ILSVRC2012_*")):
        layout += f". ImageNet as downloaded can be prepared: make imagenet ROOT={root}"
    if not root.is_dir():
        raise ValueError(f"data folder {str(root)!r} does not exist: {layout}")
    found: dict[str, list[str]] = {}
    for split in splits_there(root, needed):
        if not (root / split).is_dir():
            raise ValueError(f"data folder {str(root)!r} has no {split}/: {layout}")
        found[split] = class_names(root / split)
        if not found[split]:
            raise ValueError(f"{str(root / split)!r} has no class folders: {layout}")
    classes = found.get("train", found["val"])
    strange = sorted(set(found["val"]) - set(classes))
    if strange:
        raise ValueError(
            f"{str(root / 'val')!r} has classes that train/ lacks: {', '.join(strange[:5])}. "
            f"Add them to train/, or remove them from val/"
        )
    return classes


@readable()
def image_files(folder: str, above: tuple[str, ...] = ()) -> list[str]:
    """Image files in a folder and its subfolders, in the order of torchvision's ImageFolder.

    Hidden ones are left out: what macOS and editors leave behind is no image, or a second one.

    Raises:
        ValueError: a folder cannot be read, or links to one that it is in.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder} is a link to a folder that it is in: remove it")
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += image_files(entry.path, (*above, real))
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                found.append(entry.path)
    return sorted(found, key=os.path.split)


def open_image(path: str | Path) -> BinaryIO:
    """A file, open for reading. One that is no regular file is refused: a pipe could block."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


def load_image(path: str | Path) -> Image.Image:
    """An image file as RGB, as torchvision's ImageFolder reads it: EXIF orientation is left aside.

    Raises:
        ValueError: the file is damaged or no image; it is named.
    """
    try:
        with open_image(path) as file:
            return Image.open(file).convert("RGB")
    except Exception as error:  # Pillow raises nearly anything on a bad file
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a readable image ({reason}): {WAY_OUT}") from error


class ClassFolders(ImageFolder):
    """torchvision's ImageFolder with the labels of given classes, whichever of them it holds, and
    the images of image_files."""

    def __init__(self, root: Path, classes: list[str], **kwargs):
        self._given = classes
        super().__init__(str(root), loader=load_image, allow_empty=True, **kwargs)
        if not self.samples:
            raise ValueError(
                f"{str(root)!r} holds no images (.jpg, .png, ...) in its class folders"
            )

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return self._given, {name: label for label, name in enumerate(self._given)}

    @staticmethod
    def make_dataset(directory: Any, class_to_idx: Any, *_: Any, **__: Any) -> Any:
        there = sorted(class_to_idx.keys() & set(class_names(Path(directory))))
        return [
            (path, class_to_idx[name])
            for name in there
            for path in image_files(os.path.join(directory, name))
        ]


def choose_samples(num_samples: int, max_samples: int | None) -> np.ndarray:
    """Ascending indices of at most max_samples images, drawn once and for all (no seed)."""
    if max_samples is None or max_samples >= num_samples:
        return np.arange(num_samples)
    if max_samples < 1:
        raise ValueError(f"at least 1 image is needed, got a limit of {max_samples}")
    return np.sort(np.random.default_rng(0).choice(num_samples, max_samples, replace=False))


def epoch_length(num_samples: int, repeats: int) -> int:
    """Images that an epoch shows; with repeats DeiT rounds down to a multiple of 256."""
    return num_samples if repeats == 1 else num_samples // 256 * 256 or num_samples


def repeated_order(num_samples: int, repeats: int, seed: int) -> np.ndarray:
    """The samples of an epoch, shuffled, each `repeats` times in a row: to be dealt out to the
    processes one by one. An epoch shows a share of the samples, not more images than without.

    For 3 repeats and the epoch as seed it is DeiT's RASampler (facebookresearch/deit, samplers.py).
    """
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed)).numpy()
    return order.repeat(repeats)[: epoch_length(num_samples, repeats)]


@readable()
def fingerprint(samples: Sequence[tuple[str, int]], root: Path) -> str:
    """A hash of the names, sizes and labels of image files: it tells whether a tree has changed."""
    digest, inside = hashlib.sha256(), f"{root}/"
    for path, label in samples:
        # relpath would be most of the wait for a folder of a million images.
        name = path[len(inside) :] if path.startswith(inside) else os.path.relpath(path, root)
        digest.update(os.fsencode(f"{name}\0{os.path.getsize(path)}\0{label}\n"))
    return digest.hexdigest()


def fashion_mnist(
    cache_dir: Path, train: bool, transform: Any = None
) -> torchvision.datasets.FashionMNIST:
    """Fashion-MNIST from Debian's package where it is installed, else downloaded by torchvision."""
    raw = cache_dir / "FashionMNIST" / "raw"
    if not raw.is_dir() and DEBIAN_FASHION_MNIST.is_dir():
        partial = raw.with_name(f"raw.{os.getpid()}.tmp")
        partial.mkdir(parents=True)
        for packed in DEBIAN_FASHION_MNIST.glob("*-ubyte.gz"):
            (partial / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        try:
            partial.rename(raw)
        except OSError:
            if not raw.is_dir():
                raise
            shutil.rmtree(partial)  # another run was faster
    try:
        return torchvision.datasets.FashionMNIST(str(cache_dir), train, transform, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"Fashion-MNIST cannot be had ({error}): install Debian's dataset-fashion-mnist, or "
            f"give images of your own with data.root=DIR"
        ) from error


class Pixels:
    """The (image (H, W, 3) uint8, label) pairs of a torchvision MNIST, for a writer."""

    def __init__(self, mnist: torchvision.datasets.MNIST):
        self.images, self.labels = mnist.data.numpy(), mnist.targets.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return np.repeat(self.images[i][:, :, None], 3, axis=2), self.labels[i]
