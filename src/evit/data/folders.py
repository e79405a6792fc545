"""Images on disk: class folders, what is an image, and what ImageNet's classes are."""

import hashlib
import itertools
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS

from evit.files import telling

SPLITS = ("train", "val")
WAY_OUT = "remove it, or leave such images out: python src/prepare.py source=DIR skip_bad=true"
MAX_ASPECT = 16  # long side / short side, beyond which an image is cut before it is enlarged


def class_names(folder: Path) -> list[str]:
    """Names of the class folders in a folder, sorted, hidden ones left out."""
    found: Any = os.scandir(folder) if folder.is_dir() else []
    return sorted(e.name for e in found if e.is_dir() and not e.name.startswith("."))


def in_words(classes: list[str]) -> list[str]:
    """The names of classes, in words if they are ImageNet's WordNet ids."""
    info = ImageNetInfo()
    return list(info.label_descriptions()) if classes == info.label_names() else classes


def tree_classes(root: Path, needed: Any = SPLITS) -> list[str]:
    """The classes of ROOT/train, or of ROOT/val where that alone is needed and there."""
    found = {split: class_names(root / split) for split in SPLITS}
    if missing := [split for split in needed if not found[split]]:
        what = f"has no class folders in {missing[0]}/" if root.is_dir() else "does not exist"
        layout = " and ".join(f"{root}/{split}/CLASS/*.jpg" for split in needed)
        if root.is_dir() and missing == ["val"]:
            layout += "; data.val_fraction=0.1 holds out some of train/"
        if any(root.glob("ILSVRC*")) or any(root.glob("val/ILSVRC2012_*")):
            layout += f". ImageNet as downloaded can be prepared: make imagenet ROOT={root}"
        raise ValueError(f"data folder {str(root)!r} {what}: expected {layout}")
    classes = found["train"] or found["val"]
    if strange := ", ".join(sorted({*found["val"]} - {*classes})[:5]):
        raise ValueError(f"{root}/val has classes that train/ lacks: {strange}. Add or remove them")
    return classes


def image_files(folder: str) -> tuple[list[str], list[str]]:
    """Images in a folder and its subfolders, in the order of torchvision's ImageFolder, and the
    other files: a file of another ending than theirs is an image if Pillow opens it."""
    found, others, errors = list[str](), list[str](), list[OSError]()
    for where, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        if os.path.islink(where) and Path(where).resolve() in Path(where).parent.resolve().parents:
            raise ValueError(f"{where} is a link to a folder that it is in: remove it")
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(where, name) for name in names if not name.startswith(".")):
            if not (is_image := path.lower().endswith(IMG_EXTENSIONS)):
                with suppress(Exception), open_image(path) as file, Image.open(file):
                    is_image = True
            (found if is_image else others).append(path)
    if errors:
        raise errors[0]
    return sorted(found, key=os.path.split), others


def open_image(path: str | Path) -> BinaryIO:
    """Open a file for reading, unless it is no regular file: a pipe could block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    return open(path, "rb")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any kind as RGB. 16 bits become 8, floats are taken as 0 to 1."""
    if image.mode[0] in "IF":
        values, top = np.asarray(image).astype(np.float64), 1 if image.mode == "F" else 65535
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= top:
            raise ValueError(f"values from {low:g} to {high:g}, expected 0 to {top}")
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


def held_out(samples: list[tuple[str, int]], share: float) -> set[tuple[str, int]]:
    """A share of the images of each class, at least one: those whose names' hashes are lowest."""
    chosen = set[tuple[str, int]]()
    for _, group in itertools.groupby(samples, lambda sample: sample[1]):
        images = sorted(group, key=lambda s: hashlib.sha256(os.fsencode(Path(s[0]).name)).digest())
        count = max(1, round(share * len(images)))
        if not 0 < share < 1 or count == len(images):
            text = f"of {len(images)} images of a class, {images[0][0]} is one"
            raise ValueError(f"data.val_fraction={share} leaves none, or all, {text}")
        chosen.update(images[:count])
    return chosen


@telling(lambda: "listing images")
def class_samples(root: str | Path, classes: list[str]) -> list[tuple[str, int]]:
    """(path, label) of the images in the folders of these classes, of which some may be missing."""
    found, others, there = list[tuple[str, int]](), list[str](), class_names(Path(root))
    for label, name in enumerate(classes):
        if name in there:
            images, rest = image_files(folder := os.path.join(root, name))
            if not images:
                raise ValueError(f"class folder {folder} holds no images: add some, or remove it")
            found += [(path, label) for path in images]
            others += rest
    if others:
        some = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        rank_zero_only(print)(f"No images, left out: {len(others)} files ({some})", flush=True)
    return found


@telling(lambda: "looking for changed images")
def fingerprint(samples: list[tuple[str, int]], root: Path) -> str:
    """A hash of the names, sizes, modification times and labels of files."""
    digest, inside = hashlib.sha256(), f"{root}/"
    for path, label in samples:
        found = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a dangling link
        # relpath takes long, and is needed only for what lies beside the root.
        name = path[len(inside) :] if path.startswith(inside) else os.path.relpath(path, root)
        digest.update(os.fsencode(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0{label}\n"))
    return digest.hexdigest()


def require_imagenet(classes: list[str], root: Path) -> None:
    """Raise ValueError for other classes than ImageNet-1k's, or for another order of them."""
    expected = ImageNetInfo("imagenet-1k").label_names()
    if list(classes) != expected:
        pairs = enumerate(zip(classes, expected, strict=False))
        first = next((f", class {i} is {a!r}, not {b!r}" for i, (a, b) in pairs if a != b), "")
        way = "need ImageNet-1k's 1000 WordNet ids: take data=folder, or imagenet=false to prepare"
        raise ValueError(f"{root} has {len(classes)} classes{first}. Published checkpoints {way}")
