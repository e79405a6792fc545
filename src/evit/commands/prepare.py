"""Write class folders, ImageNet as it is downloaded, or a data set of one's own as FFCV files."""

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

from evit.data.folders import SPLITS, ClassFolders, fingerprint, require_imagenet, tree_classes
from evit.data.label_maps import label_map_paths
from evit.data.module import available_cores, require_ffcv

KAGGLE = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
NUM_IMAGES = dict(train=1_281_167, val=50_000)
ARCHIVES = {split: name for split, (name, _) in ARCHIVE_META.items()}


def prepare(
    source: str | Path,
    target: str | Path | None = None,
    num_workers: int | None = None,
    label_maps: str | Path | None = None,
    imagenet: bool = False,
    **options: Any,
) -> Path:
    """Write SOURCE's images to TARGET/train.beton and TARGET/val.beton, and return TARGET.

    conf/prepare.yaml says what the arguments are.

    Raises:
        ValueError: the tree or an image in it is not as it should be. A file that was whole
            before stays.
    """
    require_ffcv()
    from evit.data.ffcv.write import write_beton

    own = re.fullmatch(r"([\w.]+):(\w+)", str(source))
    root = Path(own[2] if own else source).expanduser().resolve()
    folder = Path(target).expanduser() if target else root.with_name(root.name + "-ffcv")
    if own and label_maps:
        raise ValueError("label_maps needs image files: a source in Python has none")
    samples: dict[str, Any]
    classes, samples = python_dataset(*own.groups()) if own else find_images(root)
    if imagenet:
        require_imagenet(classes, root)
        for split, expected in NUM_IMAGES.items():
            if (count := len(samples[split])) != expected:
                print(f"warning: {split} has {count} images, ImageNet-1k has {expected}")
    for split in "val", "train":  # the small one first, as a trial
        maps = None
        if label_maps and split == "train":
            images, labels = [path for path, _ in samples[split]], Path(label_maps).expanduser()
            maps = label_map_paths(images, tree_of(root) / split, labels.resolve())
        files = [] if own else [*samples[split], *((path, 0) for path in maps or ())]
        info = write_beton(
            folder / f"{split}.beton",
            samples[split],
            classes=classes,
            source=f"{root.name}/{split}",
            num_workers=num_workers or available_cores(),
            label_maps=maps,
            identity=fingerprint(files, root) if files else None,
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
    way = f"IMAGENET_DIR={shlex.quote(str(folder))} python src/train.py"
    return way if imagenet else f"python src/train.py {shlex.quote(f'data.root={folder}')}"


def python_dataset(module: str, function: str) -> tuple[list[str], dict[str, Any]]:
    """The classes and the splits of a data set in Python: of make_train() and make_val(), say.

    Each returns a map-style data set of (PIL image, bytes of an image file, or array; label); the
    `classes` of the first are the names of the classes.
    """
    sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
        samples = {split: getattr(found, function.replace("train", split))() for split in SPLITS}
        return list(samples["train"].classes), samples
    except (ImportError, AttributeError) as error:
        way = "Name the function of train, make_train, beside make_val, in a module here or in "
        way += "PYTHONPATH; their data sets need `classes`, names"
        raise ValueError(f"source={module}:{function}: {error}. {way}") from error


def tree_of(root: Path) -> Path:
    """The folder of train/ and val/, which Kaggle has three folders down."""
    return root / KAGGLE if (root / KAGGLE).is_dir() else root


def find_images(root: Path) -> tuple[list[str], dict[str, Any]]:
    """The classes of a tree, and the (path, label) pairs of its splits by class, then by name.

    train/ and val/ hold class folders. Or it is ImageNet: as downloaded, ILSVRC2012_img_train.tar
    and ILSVRC2012_img_val.tar, which are unpacked there, with the devkit; or val/ is flat, with the
    devkit; or as Kaggle has it, ILSVRC/Data/CLS-LOC/ and LOC_val_solution.csv.

    Raises:
        ValueError: something is missing or damaged; it says what, and what would be accepted.
    """
    base = tree_of(root)
    for split in SPLITS:
        if (root / ARCHIVES[split]).is_file() and not (base / split).is_dir():
            print(f"Unpacking {root / ARCHIVES[split]} into {root / split}, once", flush=True)
            try:
                if split == "train":
                    torchvision_imagenet.parse_train_archive(root)
                else:
                    wnids = _val_wnids(root)
                    torchvision_imagenet.parse_val_archive(
                        root, wnids=[wnids[k] for k in sorted(wnids)]
                    )
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{root / ARCHIVES[split]}: {error}") from error
    if tars := [*base.glob("train/*.tar")]:
        raise ValueError(f"{tars[0]} has not been unpacked: delete {base}/train and try again")
    flat = sorted(str(path) for path in (base / "val").glob("ILSVRC2012_val_*"))
    try:
        classes = tree_classes(base, ["train"] if flat else SPLITS)
    except ValueError as error:
        downloads = ", ".join(ARCHIVES.values())
        way = f"as downloaded ({downloads}), or as Kaggle has it ({KAGGLE}/ and {SOLUTION})"
        raise ValueError(f"{error}. ImageNet may be {way}") from None
    train = ClassFolders(base / "train", classes).samples
    if not flat:
        return classes, dict(train=train, val=ClassFolders(base / "val", classes).samples)
    wnids, labels = _val_wnids(root), {wnid: label for label, wnid in enumerate(classes)}
    if unknown := [image for image in flat if wnids.get(Path(image).stem) not in labels]:
        raise ValueError(f"{unknown[0]} is of no class that train/ has")
    val = [(image, labels[wnids[Path(image).stem]]) for image in flat]
    return classes, dict(train=train, val=sorted(val, key=lambda sample: (sample[1], sample[0])))


def _val_wnids(root: Path) -> dict[str, str]:
    """The classes of the validation images: ILSVRC2012_val_00000001 -> n01751748, ..."""
    if (root / SOLUTION).is_file():
        with open(root / SOLUTION, newline="") as file:
            rows = csv.DictReader(file)
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    try:
        if not (root / META_FILE).is_file():
            torchvision_imagenet.parse_devkit_archive(root)
        wnids = load_meta_file(root)[1]
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{root}: the classes of the validation images are missing ({error}). Put "
            f"{ARCHIVES['devkit']} there, which takes .venv/bin/python -m pip install scipy, or "
            f"Kaggle's {SOLUTION}; or sort the images by class"
        ) from error
    return {f"ILSVRC2012_val_{i:08}": wnid for i, wnid in enumerate(wnids, 1)}


def run(cfg: Any) -> None:
    """What src/prepare.py does."""
    prepare(**cfg)
