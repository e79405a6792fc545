"""ImageNet-1k as it is found: class folders, the devkit's flat val/, the archives as downloaded."""

import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from timm.data import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS

from evit.data.archives import TarMember, tar_members
from evit.data.folders import SPLITS, ClassFolders, class_names, tree_classes
from evit.data.matlab import read_matlab

ARCHIVES = dict(train="ILSVRC2012_img_train.tar", val="ILSVRC2012_img_val.tar")
DEVKIT = "ILSVRC2012_devkit_t12"
META, GROUND_TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
NUM_IMAGES = dict(train=1_281_167, val=50_000)

Image = str | TarMember
Labelled = list[tuple[Image, int]]


def find_images(root: Path) -> tuple[list[str], dict[str, Labelled]]:
    """The classes of a tree, and the (image, label) pairs of its splits by class, then by name.

    train/ and val/ hold class folders; or each may be as ImageNet is downloaded: train in
    ILSVRC2012_img_train.tar, val in ILSVRC2012_img_val.tar or flat in val/, with the devkit (as
    downloaded, unpacked, or its two files), which knows the classes of the latter two. Archives
    are read where they are.

    Raises:
        ValueError: something is missing or damaged; it says what, and what would be accepted.
    """
    flat = [str(path) for path in (root / "val").glob("ILSVRC2012_val_*")]
    packed = {
        split: (root / name).is_file() and not _has_classes(root / split)
        for split, name in ARCHIVES.items()
    }
    if not (packed["train"] or packed["val"] or flat):
        try:
            classes = tree_classes(root)
        except ValueError as error:
            raise ValueError(
                f"{error}. ImageNet may also be as downloaded: {', '.join(ARCHIVES.values())} "
                f"and {DEVKIT}.tar.gz"
            ) from None
        return classes, {split: ClassFolders(root / split, classes).samples for split in SPLITS}

    train: Labelled
    if packed["train"]:
        members = _images(root / ARCHIVES["train"])
        wnids = [Path(member.name).parent.name for member in members]
        classes = sorted(set(wnids))
        train = _labelled(members, wnids, classes)
    elif _has_classes(root / "train"):
        classes = class_names(root / "train")
        train = ClassFolders(root / "train", classes).samples
    else:
        raise ValueError(f"{root} has neither train/CLASS/*.JPEG nor {ARCHIVES['train']}")

    if _has_classes(root / "val"):
        if strange := sorted(set(class_names(root / "val")) - set(classes)):
            raise ValueError(f"{root}/val has classes that train lacks: {', '.join(strange[:5])}")
        val = ClassFolders(root / "val", classes).samples
    elif flat or packed["val"]:
        images = flat or _images(root / ARCHIVES["val"])
        val = _labelled(images, _validation_wnids(root, images), classes)
    else:
        raise ValueError(
            f"{root} has neither val/CLASS/*.JPEG nor val/ILSVRC2012_val_*.JPEG nor "
            f"{ARCHIVES['val']}"
        )
    return classes, dict(train=train, val=val)


def require_imagenet(classes: Sequence[str], root: Path) -> None:
    """Raise ValueError for other classes than ImageNet-1k's, or for another order of them."""
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


def strange_counts(classes: Sequence[str], samples: dict[str, Labelled]) -> list[str]:
    """What of the numbers of images is not as in ImageNet-1k, in sentences."""
    found = [
        f"{split} has {len(samples[split])} images, ImageNet-1k has {expected}"
        for split, expected in NUM_IMAGES.items()
        if len(samples[split]) != expected
    ]
    counts = Counter(label for _, label in samples["val"])
    wrong = [label for label in range(len(classes)) if counts[label] != 50]
    if wrong:
        found.append(
            f"val has not 50 images of each class: {len(wrong)} classes have more or fewer, "
            f"{classes[wrong[0]]} has {counts[wrong[0]]}"
        )
    return found


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and bool(class_names(folder))


def _images(archive: Path) -> list[TarMember]:
    print(f"Listing {archive}", flush=True)
    found = [m for m in tar_members(archive) if m.name.lower().endswith(IMG_EXTENSIONS)]
    if not found:
        raise ValueError(f"{archive} holds no images: download it again")
    return found


def _labelled(images: Iterable[Image], wnids: Sequence[str], classes: Sequence[str]) -> Labelled:
    """In the order of torchvision's ImageFolder."""
    labels = {wnid: label for label, wnid in enumerate(classes)}
    if strange := sorted(set(wnids) - set(classes)):
        raise ValueError(f"val has classes that train lacks: {', '.join(strange[:5])}")
    found = [(image, labels[wnid]) for image, wnid in zip(images, wnids, strict=True)]
    return sorted(found, key=lambda sample: (sample[1], str(sample[0])))


def _validation_wnids(root: Path, images: Iterable[Image]) -> list[str]:
    """The class of each image by the number in its name, ILSVRC2012_val_00000001.JPEG."""
    files = _devkit(root)
    try:
        synsets = read_matlab(files[META])["synsets"]
        # The devkit numbers its synsets in an order of its own, not the sorted one.
        wnids = {synset["ILSVRC2012_ID"].item(): synset["WNID"] for synset in synsets}
        truth = [wnids[int(line)] for line in files[GROUND_TRUTH].split()]
    except Exception as error:  # a bad file gives nearly any
        raise ValueError(
            f"{root}: the devkit's {META} and {GROUND_TRUTH} cannot be understood "
            f"({type(error).__name__}: {error}): put {DEVKIT}.tar.gz there as downloaded"
        ) from error
    found = []
    for image in images:
        match = re.search(r"ILSVRC2012_val_(\d{8})\.\w+$", str(image))
        if not match or not 1 <= int(match[1]) <= len(truth):
            raise ValueError(
                f"{image} is not ILSVRC2012_val_00000001.JPEG to _{len(truth):08}.JPEG, of which "
                f"{GROUND_TRUTH} knows the class"
            )
        found.append(truth[int(match[1]) - 1])
    return found


def _devkit(root: Path) -> dict[str, bytes]:
    names = META, GROUND_TRUTH
    for folder in root, root / "data", root / DEVKIT / "data":
        if all((folder / name).is_file() for name in names):
            return {name: (folder / name).read_bytes() for name in names}
    archive = root / f"{DEVKIT}.tar.gz"
    if not archive.is_file():
        raise ValueError(
            f"{root}: the classes of the validation images are missing. Put {archive.name} there, "
            f"or its {META} and {GROUND_TRUTH}; or sort the images into val/CLASS/"
        )
    try:
        with tarfile.open(archive) as tar:
            members = {Path(m.name).name: tar.extractfile(m) for m in tar if m.isfile()}
            return {name: members[name].read() for name in names}  # type: ignore[union-attr]
    except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{archive} is damaged ({error}): download it again") from error
