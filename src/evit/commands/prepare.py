"""Write class folders, ImageNet as it is downloaded, or a data set of one's own as FFCV files."""

import csv
import importlib
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.datasets import imagenet as torchvision_imagenet
from torchvision.datasets.imagenet import ARCHIVE_META, META_FILE, load_meta_file

from evit.data.folders import (
    SPLITS,
    ClassFolders,
    fingerprint,
    require_imagenet,
    tree_classes,
)
from evit.data.label_maps import label_map_paths, require_label_maps
from evit.data.module import available_cores, require_ffcv

KAGGLE = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
NUM_IMAGES = dict(train=1_281_167, val=50_000)
ARCHIVES = {split: name for split, (name, _) in ARCHIVE_META.items()}

Labelled = list[tuple[str, int]]


def prepare(
    source: str | Path,
    target: str | Path | None = None,
    num_workers: int | None = None,
    label_maps: str | Path | None = None,
    imagenet: bool = False,
    **options: Any,
) -> Path:
    """Write SOURCE's images to TARGET/train.beton and TARGET/val.beton, and return TARGET.

    A file that is there, of the same images and settings, is kept. An interrupted one is begun
    anew.

    Args:
        source: train/ and val/ of class folders; the files of ImageNet (find_images); or
            PACKAGE.MODULE:FUNCTION, which gives a data set in Python (python_dataset).
        target: a folder; None: SOURCE-ffcv beside SOURCE, ./FUNCTION-ffcv for a function.
        num_workers: processes; None: one per core.
        label_maps: a folder with a label map for each training image; train.beton will hold them.
        imagenet: refuse other classes than ImageNet-1k's, and warn of other numbers of images.
        **options: write_beton's mode, max_resolution, jpeg_quality, skip_bad.

    Raises:
        ValueError: the tree or an image in it is not as it should be. A file that was whole
            before stays.
    """
    require_ffcv()
    from evit.data.ffcv.write import write_beton

    samples: dict[str, Any]
    own = re.fullmatch(r"([\w.]+):(\w+)", str(source))
    root = Path(own[2] if own else source).expanduser().resolve()
    folder = Path(target).expanduser() if target else root.with_name(root.name + "-ffcv")
    if own:
        if label_maps:
            raise ValueError("label_maps needs image files: a source in Python has none")
        classes, samples = python_dataset(*own.groups())
    else:
        classes, samples = find_images(root)
    if imagenet:
        require_imagenet(classes, root)
        for warning in [] if own else strange_counts(classes, samples):
            print(f"warning: {warning}", flush=True)
    maps = None
    if label_maps:
        images = [path for path, _ in samples["train"]]
        inside = root / KAGGLE if (root / KAGGLE).is_dir() else root
        found = Path(label_maps).expanduser().resolve()
        maps = label_map_paths(images, inside / "train", found)
        require_label_maps(maps)
    for split in "val", "train":  # the small one first, as a trial
        used = maps if split == "train" else None
        identity = None
        if not own:
            identity = fingerprint([*samples[split], *((path, 0) for path in used or ())], root)
        info = write_beton(
            folder / f"{split}.beton",
            samples[split],
            classes=classes,
            source=f"{root.name}/{split}",
            num_workers=num_workers or available_cores(),
            progress=True,
            label_maps=used,
            identity=identity,
            **options,
        )
        print(
            f"{folder / split}.beton: {info['num_samples']} images in {info['num_classes']} "
            f"classes, {info['bytes'] / 1e6:.1f} MB, {info['kept_original']} as they were, "
            f"{len(info['skipped'])} left out"
        )
    print(f"Train on them: {train_command(folder, imagenet)}")
    return folder


def train_command(folder: Path, imagenet: bool) -> str:
    """What trains on the files in a folder, to be copied into a shell."""
    if imagenet:
        return f"IMAGENET_DIR={shlex.quote(str(folder))} python src/train.py"
    root = f"data.root={folder}"
    if not re.fullmatch(r"[\w/.+-]+", str(folder)):  # Hydra's quotes, and the shell's around them
        root = shlex.quote("data.root='{}'".format(str(folder).replace("'", "\\'")))
    return f"python src/train.py {root}"


def python_dataset(module: str, function: str) -> tuple[list[str], dict[str, Any]]:
    """The classes and the splits of a data set in Python: of make_train() and make_val(), say.

    Each returns a map-style data set of (PIL image, bytes of an image file, or array; label); the
    `classes` of the first are the names of the classes.

    Raises:
        ValueError: there are no such functions, or no classes.
    """
    name = f"{module}:{function}"
    if "train" not in function:
        raise ValueError(f"source={name}: name the function of train, make_train; val is make_val")
    sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
        samples = {split: getattr(found, function.replace("train", split))() for split in SPLITS}
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"source={name}: {error}. It is looked for here and in PYTHONPATH"
        ) from error
    classes = getattr(samples["train"], "classes", None)
    if not classes:
        raise ValueError(f"source={name}: its data sets need `classes`, the names of the classes")
    return list(classes), samples


def find_images(root: Path) -> tuple[list[str], dict[str, Labelled]]:
    """The classes of a tree, and the (path, label) pairs of its splits by class, then by name.

    train/ and val/ hold class folders. Or it is ImageNet: as downloaded, ILSVRC2012_img_train.tar
    and ILSVRC2012_img_val.tar, which are unpacked there, with the devkit; or val/ is flat, with the
    devkit; or as Kaggle has it, ILSVRC/Data/CLS-LOC/ and LOC_val_solution.csv.

    Raises:
        ValueError: something is missing or damaged; it says what, and what would be accepted.
    """
    base = root / KAGGLE if (root / KAGGLE).is_dir() else root
    for split in SPLITS:
        if (root / ARCHIVES[split]).is_file() and not (base / split).is_dir():
            _unpack(root, split)
    if unfinished := [*base.glob("train/*.tar")]:
        raise ValueError(
            f"{unfinished[0]} has not been unpacked: delete {base}/train and try again"
        )
    flat = sorted(str(path) for path in (base / "val").glob("ILSVRC2012_val_*"))
    try:
        classes = tree_classes(base, ["train"] if flat else SPLITS)
    except ValueError as error:
        raise ValueError(
            f"{error}. ImageNet may be as downloaded ({', '.join(ARCHIVES.values())}), or as "
            f"Kaggle has it ({KAGGLE}/ and {SOLUTION})"
        ) from None
    splits = [split for split in SPLITS if not (flat and split == "val")]
    found = {split: ClassFolders(base / split, classes).samples for split in splits}
    if flat:
        found["val"] = _labelled(flat, _val_wnids(root), classes)
    return classes, found


def _unpack(root: Path, split: str) -> None:
    """Unpack one of ImageNet's archives, and check it, by torchvision."""
    print(f"Unpacking {root / ARCHIVES[split]} into {root / split}, once", flush=True)
    try:
        if split == "val":
            _read_devkit(root)
        getattr(torchvision_imagenet, f"parse_{split}_archive")(root)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{root / ARCHIVES[split]}: {error}") from error


def _read_devkit(root: Path) -> list[str]:
    """The class of each of ImageNet's validation images, in the order of their numbers."""
    try:
        if not (root / META_FILE).is_file():
            torchvision_imagenet.parse_devkit_archive(root)
        return load_meta_file(root)[1]
    except ImportError as error:
        raise ValueError(
            f"reading {ARCHIVES['devkit']} takes scipy: .venv/bin/python -m pip install scipy"
        ) from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{root}: the classes of the validation images are missing ({error}). Put "
            f"{ARCHIVES['devkit']} there, or Kaggle's {SOLUTION}; or sort the images by class"
        ) from error


def _val_wnids(root: Path) -> dict[str, str]:
    """ILSVRC2012_val_00000001 -> n01751748, ..."""
    if not (root / SOLUTION).is_file():
        wnids = _read_devkit(root)
        return {f"ILSVRC2012_val_{i:08}": wnid for i, wnid in enumerate(wnids, 1)}
    with open(root / SOLUTION, newline="") as file:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}


def _labelled(images: list[str], wnids: dict[str, str], classes: Sequence[str]) -> Labelled:
    """In the order of torchvision's ImageFolder."""
    labels = {wnid: label for label, wnid in enumerate(classes)}
    found = []
    for image in images:
        wnid = wnids.get(Path(image).stem)
        if wnid not in labels:
            raise ValueError(f"{image} is of class {wnid or 'unknown'}, which train/ lacks")
        found.append((image, labels[wnid]))
    return sorted(found, key=lambda sample: (sample[1], sample[0]))


def strange_counts(classes: Sequence[str], samples: dict[str, Labelled]) -> list[str]:
    """Sentences on numbers of images that are not ImageNet-1k's."""
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
