"""Images on disk: class folders, what is an image, and what ImageNet's classes are."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

SPLITS = ("train", "val")
WAY_OUT = (
    "remove or replace it, or leave such images out: python src/prepare.py source=DIR skip_bad=true"
)
MAX_ASPECT = 16  # long side / short side, beyond which an image is cut before it is enlarged


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
def tree_classes(root: Path, needed: Sequence[str] = SPLITS) -> list[str]:
    """The classes of ROOT/train, once ROOT is seen to be a tree of train/CLASS and val/CLASS.

    Where val/ alone is needed and there is no train/, the classes are those of val/.
    """
    layout = "expected " + " and ".join(f"{root}/{split}/CLASS/*.jpg" for split in needed)
    if any(root.glob("ILSVRC*")) or any(root.glob("val/ILSVRC2012_*")):
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
    classes = next(iter(found.values()))
    if strange := sorted(set(found.get("val", ())) - set(classes)):
        raise ValueError(
            f"{str(root / 'val')!r} has classes that train/ lacks: {', '.join(strange[:5])}. "
            f"Add them to train/, or remove them from val/"
        )
    return classes


@readable()
def image_files(
    folder: str, others: list[str] | None = None, above: tuple[str, ...] = ()
) -> list[str]:
    """Image files in a folder and its subfolders, in the order of torchvision's ImageFolder.

    Files with another ending than the usual ones are images if Pillow opens them; the rest is added
    to `others`. Hidden files are left out: macOS and editors leave them behind.
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
                found += image_files(entry.path, others, (*above, real))
            elif entry.name.lower().endswith(IMG_EXTENSIONS) or _opens(entry.path):
                found.append(entry.path)
            elif others is not None:
                others.append(entry.path)
    return sorted(found, key=os.path.split)


def _opens(path: str) -> bool:
    try:
        with open_image(path) as file, Image.open(file):
            return True
    except Exception:  # Pillow raises nearly anything on what is no image
        return False


def open_image(path: str | Path) -> BinaryIO:
    """A file, open for reading. One that is no regular file is refused: a pipe could block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    return open(path, "rb")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any kind as RGB. 16 bits become 8, floats are taken as 0 to 1."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        low, high = values.min(), values.max()
        top = 1.0 if image.mode == "F" else 65535.0
        if not 0 <= low <= high <= top:
            raise ValueError(f"values from {low:g} to {high:g}, expected 0 to {top:g}")
        image = Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))
    return image.convert("RGB")


def load_image(path: str | Path) -> Image.Image:
    """An image file as RGB, as torchvision reads it: EXIF orientation is left aside."""
    try:
        with open_image(path) as file:
            return to_rgb(Image.open(file))
    except Exception as error:  # Pillow raises nearly anything on a bad file
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a readable image ({reason}): {WAY_OUT}") from error


def cut_long(image: Image.Image) -> Image.Image:
    """The middle of an image that is longer than MAX_ASPECT times its short side."""
    short = min(image.size)
    left, top = ((side - min(side, MAX_ASPECT * short)) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left + top else image


class ClassFolders(ImageFolder):
    """torchvision's ImageFolder with the labels of given classes, whichever of them it holds, and
    the images of image_files. Files that are no images are counted, and left out."""

    def __init__(self, root: str | Path, classes: list[str], transform: Any = None):
        self._given = classes
        super().__init__(str(root), transform, loader=load_image, allow_empty=True)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return self._given, {name: label for label, name in enumerate(self._given)}

    def make_dataset(  # type: ignore[override]
        self, directory: Any, class_to_idx: Any, *_: Any, **__: Any
    ) -> Any:
        found, others = [], list[str]()
        for name in sorted(class_to_idx.keys() & set(class_names(Path(directory)))):
            files = image_files(os.path.join(directory, name), others)
            if not files:
                folder = os.path.join(directory, name)
                raise ValueError(f"class folder {folder} holds no images: add some, or remove it")
            found += [(path, class_to_idx[name]) for path in files]
        if others:
            some = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
            rank_zero_only(print)(f"No images, left out: {len(others)} files ({some})", flush=True)
        return found


def fingerprint(samples: Sequence[tuple[str, int]], root: Path) -> str:
    """A hash of the names, sizes, modification times and labels of files: it tells whether a tree
    has changed."""
    digest, inside = hashlib.sha256(), f"{root}/"
    for path, label in samples:
        # relpath would be most of the wait for a folder of a million images.
        name = path[len(inside) :] if path.startswith(inside) else os.path.relpath(path, root)
        try:
            found = os.stat(path)
            said = f"{found.st_size}\0{found.st_mtime_ns}"
        except OSError:  # a dangling link, which is told when it is read
            said = "missing"
        digest.update(os.fsencode(f"{name}\0{said}\0{label}\n"))
    return digest.hexdigest()


def require_imagenet(classes: Sequence[str], root: Path) -> None:
    """Raise ValueError for other classes than ImageNet-1k's, or for another order of them."""
    from timm.data import ImageNetInfo

    expected = ImageNetInfo("imagenet-1k").label_names()
    if len(classes) != len(expected):
        raise ValueError(
            f"{root} has {len(classes)} classes, not {len(expected)}: for a data set of your own "
            f"use data=folder data.root={root}, and imagenet=false to prepare it"
        )
    for label, (name, wnid) in enumerate(zip(classes, expected, strict=True)):
        if name != wnid:
            raise ValueError(
                f"{root}: class {label} is {name!r}, where ImageNet-1k has {wnid!r}. Published "
                f"checkpoints need its order: name the class folders by their WordNet ids"
            )
