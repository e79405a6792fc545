"""Write images as FFCV files: class folders, ImageNet as it is downloaded, data sets in Python."""

import csv
import importlib
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from torchvision.datasets import imagenet as torchvision_imagenet
from torchvision.datasets.imagenet import ARCHIVE_META, META_FILE, load_meta_file

from evit.data import folders
from evit.data.folders import SPLITS, class_samples
from evit.data.label_maps import label_map_paths
from evit.data.module import require_ffcv

KAGGLE = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
NUM_IMAGES = dict(train=1_281_167, val=50_000)
ARCHIVES = {split: name for split, (name, _) in ARCHIVE_META.items()}


def run(cfg: Any) -> None:
    prepare(**cfg)


def prepare(source, target=None, label_maps=None, imagenet: bool = False, **options: Any) -> Path:
    """Write TARGET/train.beton and TARGET/val.beton, return TARGET; as conf/prepare.yaml has it."""
    require_ffcv()
    from evit.data.ffcv.write import write_beton

    own = re.fullmatch(r"([\w.]+):(\w+)", str(source))
    root = Path(own[2] if own else source).expanduser().resolve()
    folder = Path(target).expanduser() if target else root.with_name(root.name + "-ffcv")
    if own and label_maps:
        raise ValueError("label_maps needs image files: a source in Python has none")
    classes, samples = python_dataset(*own.groups()) if own else find_images(root)
    if imagenet:
        folders.require_imagenet(classes, root)
        for split, expected in NUM_IMAGES.items():
            if (count := len(samples[split])) != expected:
                print(f"warning: {split} has {count} images, ImageNet-1k has {expected}")
    for split in "val", "train":  # the small one first, as a trial
        path, more = folder / f"{split}.beton", dict[str, Any](source=f"{root.name}/{split}")
        if label_maps and split == "train":
            labels, tree = Path(label_maps).expanduser().resolve(), tree_of(root) / split
            more["label_maps"] = label_map_paths(samples[split], tree, labels)
        if not own:
            files = [*samples[split], *((name, 0) for name in more.get("label_maps", ()))]
            more["identity"] = folders.fingerprint(files, root)
        info = write_beton(path, samples[split], classes=classes, **more, **options)
        size = f"{info['num_samples']} images in {info['num_classes']} classes, "
        size += f"{info['bytes'] / 1e6:.1f} MB, {info['kept_original']} as they were"
        print(f"{path}: {size}, {len(info['skipped'])} left out")
    print(f"Train on them: {train_command(folder, imagenet)}")
    return folder


def train_command(folder: Path, imagenet: bool) -> str:
    """What trains on the files in a folder, to be copied into a shell."""
    way = f"IMAGENET_DIR={shlex.quote(str(folder))} python src/train.py"
    return way if imagenet else f"python src/train.py {shlex.quote(f'data.root={folder}')}"


def python_dataset(module: str, function: str) -> tuple[list[str], dict[str, Any]]:
    """Classes and splits of a data set in Python, made by functions as make_train and make_val."""
    sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
        samples = {split: getattr(found, function.replace("train", split))() for split in SPLITS}
        return list(samples["train"].classes), samples
    except (ImportError, AttributeError, TypeError) as error:
        way = "in a module here or in PYTHONPATH; their data sets need `classes`, names"
        text = f"{error}. Name the function of train, make_train, beside make_val, {way}"
        raise ValueError(f"source={module}:{function}: {text}") from error


def tree_of(root: Path) -> Path:
    return root / KAGGLE if (root / KAGGLE).is_dir() else root


def find_images(root: Path) -> tuple[list[str], dict[str, Any]]:
    """The classes of a tree, and the (path, label) pairs of its splits by class, then by name."""
    base = tree_of(root)
    for split in SPLITS:
        archive = root / ARCHIVES[split]
        if archive.is_file() and not (base / split).is_dir():
            print(f"Unpacking {archive} into {root / split}, once", flush=True)
            wanted = dict(wnids=list(_val_wnids(root).values())) if split == "val" else {}
            try:
                getattr(torchvision_imagenet, f"parse_{split}_archive")(root, **wanted)
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{archive}: {error}") from error
    if tars := [*base.glob("train/*.tar")]:
        raise ValueError(f"{tars[0]} has not been unpacked: delete {base}/train and try again")
    flat = sorted(str(path) for path in (base / "val").glob("ILSVRC2012_val_*"))
    try:
        classes = folders.tree_classes(base, ["train"] if flat else SPLITS)
    except ValueError as error:
        way = f"as downloaded ({', '.join(ARCHIVES.values())}), or as Kaggle has it ({KAGGLE}/)"
        raise ValueError(f"{error}. ImageNet may be {way}") from None
    train = class_samples(base / "train", classes)
    if not flat:
        return classes, dict(train=train, val=class_samples(base / "val", classes))
    wnid_of, labels = _val_wnids(root), {wnid: label for label, wnid in enumerate(classes)}
    if unknown := [image for image in flat if wnid_of.get(Path(image).stem) not in labels]:
        raise ValueError(f"{unknown[0]} is of no class that train/ has")
    val = [(image, labels[wnid_of[Path(image).stem]]) for image in flat]
    return classes, dict(train=train, val=sorted(val, key=lambda sample: (sample[1], sample[0])))


def _val_wnids(root: Path) -> dict[str, str]:
    """The classes of the validation images in order: ILSVRC2012_val_00000001 -> n01751748, ..."""
    if (root / SOLUTION).is_file():
        with open(root / SOLUTION, newline="") as file:
            rows = sorted((row["ImageId"], row["PredictionString"]) for row in csv.DictReader(file))
        return {image: classes.split()[0] for image, classes in rows}
    try:
        if not (root / META_FILE).is_file():
            torchvision_imagenet.parse_devkit_archive(root)
        wnids = load_meta_file(root)[1]
    except (ImportError, OSError, RuntimeError) as error:
        way = f"put {ARCHIVES['devkit']} there and pip install scipy, or put {SOLUTION} there"
        raise ValueError(f"{root} lacks the classes of val/ ({error}): {way}") from error
    return {f"ILSVRC2012_val_{i:08}": wnid for i, wnid in enumerate(wnids, 1)}
