"""Prepare images once: as FFCV files (src/prepare.py); their token labels (src/label_maps.py)."""

import csv
import importlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import imagenet as torchvision_imagenet
from torchvision.datasets.imagenet import ARCHIVE_META, META_FILE, load_meta_file
from torchvision.transforms import Compose

from evit import load_checkpoint
from evit.data import folders
from evit.data.folders import SPLITS, ClassFolders
from evit.data.label_maps import MAX_ID, TOP, label_map_paths, read_label_map
from evit.data.module import available_cores, require_ffcv
from evit.files import followed, whole_file
from evit.models import create_model

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
    ValueError: the tree or an image is not as it should be. A file that was whole before stays.
    """
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
        maps: list[str] = []
        if label_maps and split == "train":
            images, labels = [path for path, _ in samples[split]], Path(label_maps).expanduser()
            maps = label_map_paths(images, tree_of(root) / split, labels.resolve())
        files = [] if own else [*samples[split], *((path, 0) for path in maps)]
        info = write_beton(
            folder / f"{split}.beton",
            samples[split],
            classes=classes,
            source=f"{root.name}/{split}",
            num_workers=num_workers or available_cores(),
            label_maps=maps or None,
            identity=folders.fingerprint(files, root) if files else None,
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
    """Classes and splits of a data set in Python, made by functions as make_train and make_val.

    Each returns a map-style data set of (PIL image, bytes of an image file, or array; label).
    """
    sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
        samples = {split: getattr(found, function.replace("train", split))() for split in SPLITS}
        return list(samples["train"].classes), samples
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"source={module}:{function}: {error}. Name the function of train, make_train, beside "
            f"make_val, in a module here or in PYTHONPATH; their data sets need `classes`, names"
        ) from error


def tree_of(root: Path) -> Path:
    """The folder with train/ and val/; in Kaggle's layout it is three levels down."""
    return root / KAGGLE if (root / KAGGLE).is_dir() else root


def find_images(root: Path) -> tuple[list[str], dict[str, Any]]:
    """The classes of a tree, and the (path, label) pairs of its splits by class, then by name.

    train/ and val/ hold class folders. Or it is ImageNet: as downloaded, ILSVRC2012_img_train.tar
    and ILSVRC2012_img_val.tar, which are unpacked there, with the devkit; or val/ is flat, with the
    devkit; or as Kaggle has it, ILSVRC/Data/CLS-LOC/ and LOC_val_solution.csv.
    ValueError: something is missing or damaged; it says what, and what would be accepted.
    """
    base = tree_of(root)
    for split in SPLITS:
        archive = root / ARCHIVES[split]
        if archive.is_file() and not (base / split).is_dir():
            print(f"Unpacking {archive} into {root / split}, once", flush=True)
            try:
                if split == "train":
                    torchvision_imagenet.parse_train_archive(root)
                else:
                    wnids = [wnid for _, wnid in sorted(_val_wnids(root).items())]
                    torchvision_imagenet.parse_val_archive(root, wnids=wnids)
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{archive}: {error}") from error
    if tars := [*base.glob("train/*.tar")]:
        raise ValueError(f"{tars[0]} has not been unpacked: delete {base}/train and try again")
    flat = sorted(str(path) for path in (base / "val").glob("ILSVRC2012_val_*"))
    try:
        classes = folders.tree_classes(base, ["train"] if flat else SPLITS)
    except ValueError as error:
        downloads = ", ".join(ARCHIVES.values())
        way = f"as downloaded ({downloads}), or as Kaggle has it ({KAGGLE}/ and {SOLUTION})"
        raise ValueError(f"{error}. ImageNet may be {way}") from None
    train = ClassFolders(base / "train", classes).samples
    if not flat:
        return classes, dict(train=train, val=ClassFolders(base / "val", classes).samples)
    wnid_of, labels = _val_wnids(root), {wnid: label for label, wnid in enumerate(classes)}
    if unknown := [image for image in flat if wnid_of.get(Path(image).stem) not in labels]:
        raise ValueError(f"{unknown[0]} is of no class that train/ has")
    val = [(image, labels[wnid_of[Path(image).stem]]) for image in flat]
    return classes, dict(train=train, val=sorted(val, key=lambda sample: (sample[1], sample[0])))


def _val_wnids(root: Path) -> dict[str, str]:
    """The classes of the validation images: ILSVRC2012_val_00000001 -> n01751748, ..."""
    if (root / SOLUTION).is_file():
        with open(root / SOLUTION, newline="") as file:
            return {r["ImageId"]: r["PredictionString"].split()[0] for r in csv.DictReader(file)}
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
    """Run src/prepare.py with a composed configuration."""
    prepare(**cfg)


def make_label_maps(
    source: str | Path,
    target: str | Path,
    model_name: str,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    img_size: int | None = None,
    crop_pct: float = 1.0,
    crop_mode: str = "squash",
    batch_size: int = 32,
    num_workers: int | None = None,
) -> Path:
    """Write token labels, TARGET/CLASS/STEM.pt for every image of SOURCE/train; return TARGET.

    As TokenLabeling's generate_label.py: the classifier is applied at every position of the last
    features, and the five best classes of each position are kept (evit.data.label_maps).

    conf/label_maps.yaml says what the arguments are; the model's own mean, std and interpolation
    are used. Maps that are there already, whole and not older than their images, are kept.
    """
    source, target = (Path(path).expanduser().resolve() for path in (source, target))
    if crop_mode not in ("center", "squash") or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_mode={crop_mode}, crop_pct={crop_pct}: center or squash, in (0, 1]")
    classes = folders.class_names(source / "train")
    if not TOP <= len(classes) <= MAX_ID + 1:
        way = f"label maps are for {TOP} to {MAX_ID + 1} classes, of train/CLASS/*.jpg"
        raise ValueError(f"{source}/train has {len(classes)} classes: {way}")
    data = ClassFolders(source / "train", classes)
    images = [image for image, _ in data.samples]
    paths = label_map_paths(images, source / "train", target, needed=False)
    model = annotator(model_name, len(classes), pretrained, checkpoint, img_size)
    fixed = bool(getattr(model, "pretrained_cfg", {}).get("fixed_input_size"))
    config = resolve_model_data_config(model, dict(img_size=img_size), use_test_size=not fixed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval().requires_grad_(False)
    _, high, wide = config["input_size"]
    shape = tuple(dense_logits(model, torch.zeros(1, 3, high, wide, device=device)).shape[2:])
    weights = str(Path(checkpoint).expanduser().resolve()) if checkpoint else "timm's"
    crop: dict[str, Any] = dict(crop_pct=crop_pct, crop_mode=crop_mode)
    facts = dict(model_name=model_name, weights=weights, img_size=[high, wide]) | crop
    facts |= dict(classes=len(classes), cells=list(shape))
    said = target / "label_maps.json"
    if said.is_file() and (before := json.loads(said.read_text())) != facts:
        way = "choose another target, or delete it"
        raise ValueError(f"{target} holds label maps of {before}, not of {facts}: {way}")
    target.mkdir(parents=True, exist_ok=True)
    said.write_text(json.dumps(facts, indent=1))

    missing = list[int]()
    for i, path in enumerate(paths):
        try:
            read_label_map(path, len(classes), shape)
            missing += [i] * (os.path.getmtime(path) < os.path.getmtime(images[i]))
        except (ValueError, OSError):
            missing.append(i)
    text = f"{len(paths)} images in {len(classes)} classes, {len(paths) - len(missing)} have their "
    text += f"label maps already: {model_name} at {high} x {wide} px gives {shape} cells"
    print(text, flush=True)
    cut = [folders.cut_long] * (crop_mode == "center")
    data.transform = Compose([*cut, create_transform(**config | crop)])
    workers = available_cores() if num_workers is None else num_workers
    loader: Any = DataLoader(Subset(data, missing), batch_size, num_workers=workers)
    left = iter(missing)
    for batch, _ in followed(loader, f"Writing {len(missing)} label maps", len(loader)):
        maps = torch.stack(dense_logits(model, batch.to(device)).topk(TOP, dim=1), 1).half().cpu()
        if not maps.isfinite().all():
            raise ValueError("the model's logits are not finite, or too large for float16")
        for label_map, i in zip(maps, left, strict=False):
            Path(paths[i]).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(Path(paths[i])) as file:
                torch.save(label_map.clone(), file)
    return target


def annotator(
    name: str, num_classes: int, pretrained: bool, checkpoint: Any, img_size: int | None
) -> Any:
    """Create the classifier with its weights, at keep rate 1 if it has a reducer."""
    if not checkpoint and not pretrained:
        raise ValueError(f"{name} would have random weights: checkpoint=PATH, or pretrained=true")
    options = dict(num_classes=num_classes if checkpoint else None)  # timm leaves out what is None
    try:
        model: Any = create_model(name, not checkpoint, img_size=img_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = create_model(name, not checkpoint, **options)  # takes images of any size
    if checkpoint:
        load_checkpoint(model, checkpoint)
    elif model.num_classes != num_classes:
        way = "give checkpoint=PATH of one that was trained on these classes"
        text = f"{name} has {model.num_classes} classes and the images have {num_classes}: {way}"
        raise ValueError(text)
    if hasattr(model, "set_keep_rate"):
        model.set_keep_rate(1.0)
    return model


def dense_logits(model: Any, images: Tensor) -> Tensor:
    """Logits (B, K, H, W): the classifier applied at every position of the last features.

    LV-ViT has a classifier for positions. Any other head is given the features of one position as
    if they were all: pooling then changes nothing.
    """
    x, prefix = model.forward_features(images), getattr(model, "num_prefix_tokens", 0)
    try:
        if x.ndim == 3:
            x = x[:, prefix:].unflatten(1, model.patch_embed.grid_size)
            one = x.flatten(0, 2)[:, None].expand(-1, prefix + 1, -1)
        elif x.shape[1] == model.num_features:
            x = x.movedim(1, -1)
            one = x.flatten(0, 2)[:, :, None, None]
        else:
            one = x.flatten(0, 2)[:, None, None]
        logits = model.aux_head(x) if hasattr(model, "aux_head") else model.forward_head(one)
        return logits.reshape(*x.shape[:3], model.num_classes).movedim(-1, 1)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"{type(model).__name__} keeps no grid of features: {error}") from error


def label_maps(cfg: Any) -> None:
    """Run src/label_maps.py with a composed configuration."""
    make_label_maps(**cfg)
