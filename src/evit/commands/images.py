"""Run a model on some images: draw which patches are kept, or predict classes."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from evit.commands import checkpoint
from evit.config import counted, listed
from evit.data.batch import normalize
from evit.data.folders import image_files, in_words, load_image
from evit.data.imagefolder import evaluation_transform
from evit.files import telling
from evit.report.evaluations import rate
from evit.report.pictures import draw_features, draw_kept


@telling(lambda: "drawing")
def visualize(cfg: DictConfig) -> Path:
    """Draw the kept patches, or the final feature maps, of images; return the file."""
    if cfg.show not in ("kept", "features"):
        raise ValueError(f"show must be kept or features, got {cfg.show!r}")
    if cfg.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {cfg.num_images}")
    model, about, cfg, _ = checkpoint.opened(cfg)
    if not hasattr(model, "reducer"):
        raise ValueError(f"{type(model).__name__} reduces no tokens: {checkpoint.REDUCED}")
    draw, suffix = dict(kept=(draw_kept, ""), features=(draw_features, "-features"))[cfg.show]
    target = checkpoint.target_file(cfg, about, "pictures", f"{suffix}.png")
    if cfg.images is not None:
        pixels = read_pixels(image_paths(cfg.images, cfg.num_images), cfg)
        truths = []
    else:
        data = checkpoint.validation(cfg, cfg.num_images, cfg.num_images, ready=True)
        pixels, labels = next(iter(data.val_dataloader()))
        truths = [in_words(list(data.classes))[label] for label in labels]
    print(f"Drawing {counted(len(pixels), 'image')} at keep rate {rate(about)}", flush=True)
    names = [] if cfg.random else class_names(about)
    picture = draw(model, normalize(pixels, about["mean"], about["std"]), pixels, names, truths)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target)
    print(f"{target} ({picture.width} x {picture.height} pixels)")
    return target


@telling(lambda: "predicting")
@torch.no_grad()
def predict(cfg: DictConfig) -> None:
    """Predict the classes of images; print names and probabilities, and write a table."""
    if cfg.top < 1 or cfg.batch_size < 1:
        raise ValueError(f"top={cfg.top} and batch_size={cfg.batch_size} must be at least 1")
    rows: list[Any] = [("image", "rank", "class", "probability")]
    paths = image_paths(cfg.images)
    model, about, cfg, _ = checkpoint.opened(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = class_names(about)
    model.to(device)
    for start in range(0, len(paths), cfg.batch_size):
        some = paths[start : start + cfg.batch_size]
        images = normalize(read_pixels(some, cfg).to(device), about["mean"], about["std"])
        values, labels = model(images).softmax(1).topk(min(cfg.top, len(names)))
        for path, *best in zip(some, values.tolist(), labels.tolist(), strict=True):
            found = [(names[label], value) for value, label in zip(*best, strict=True)]
            print(f"{path}: " + ", ".join(f"{k} {v:.1%}" for k, v in found), flush=True)
            rows += [(str(path), i, k, f"{v:.6f}") for i, (k, v) in enumerate(found, 1)]
    if cfg.target:
        Path(cfg.target).parent.mkdir(parents=True, exist_ok=True)
        with open(cfg.target, "w", newline="") as file:
            csv.writer(file).writerows(rows)
        print(f"{cfg.target} ({counted(len(paths), 'image')})")


def class_names(about: dict[str, Any]) -> list[str]:
    """The names of a model's classes; where none are known, ImageNet's, or class 0, 1, ..."""
    numbers = [f"class {label}" for label in range(about["num_classes"])]
    unknown = ImageNetInfo().label_names() if len(numbers) == 1000 else numbers
    return in_words(about["classes"] or unknown)


def image_paths(images: Any, most: int | None = None) -> list[Path]:
    """List the named images, and `most` images spread over each folder (None: all)."""
    given: Any = OmegaConf.to_object(images) if OmegaConf.is_list(images) else images
    paths: list[Path] = []
    for path in (Path(name).expanduser() for name in listed(given)):
        if not path.exists():
            raise ValueError(f"images={path} does not exist: give a folder, an image, or a list")
        inside = [Path(name) for name in image_files(str(path))] if path.is_dir() else [path]
        count = min(most or len(inside), len(inside))
        paths += [inside[i * len(inside) // count] for i in range(count)]
    if not paths:
        raise ValueError(f"images={given}: there are no images ({', '.join(IMG_EXTENSIONS)})")
    return paths


def read_pixels(paths: Iterable[Path], cfg: DictConfig) -> Tensor:
    """Crop images as in evaluations, to uint8 (B, 3, img_size, img_size)."""
    crop = evaluation_transform(cfg.img_size, cfg.crop_pct)
    return torch.stack([crop(load_image(path)) for path in paths])
