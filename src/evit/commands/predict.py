"""Predict the classes of images: their names and probabilities, printed or as a table."""

import csv
from pathlib import Path

import torch
from omegaconf import DictConfig
from timm.data import ImageNetInfo

from evit.commands import checkpoint
from evit.commands.visualize import image_paths
from evit.data.batch import normalize
from evit.data.folders import load_image
from evit.data.imagefolder import evaluation_transform


@torch.no_grad()
def run(cfg: DictConfig) -> None:
    """Predict by a composed configuration: images of a folder, or those that are named."""
    if cfg.top < 1 or cfg.batch_size < 1:
        raise ValueError(f"top={cfg.top} and batch_size={cfg.batch_size} must be at least 1")
    paths = image_paths(cfg.images)
    model, about, cfg = checkpoint.opened(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = about["classes"] or [f"class {label}" for label in range(model.num_classes)]
    if names[0] in ("class 0", "n01440764") and len(names) == 1000:  # ImageNet's
        names = ImageNetInfo().label_descriptions()
    crop, rows = evaluation_transform(cfg.img_size, cfg.crop_pct), []
    model.to(device)
    for start in range(0, len(paths), cfg.batch_size):
        some = paths[start : start + cfg.batch_size]
        pixels = torch.stack([crop(load_image(path)) for path in some]).to(device)
        shares = model(normalize(pixels, about["mean"], about["std"])).softmax(1)
        best = zip(
            *(found.tolist() for found in shares.topk(min(cfg.top, len(names)))), strict=True
        )
        for path, (values, labels) in zip(some, best, strict=True):
            found = [(names[k], value) for k, value in zip(labels, values, strict=True)]
            print(f"{path}: " + ", ".join(f"{k} {v:.1%}" for k, v in found), flush=True)
            rows += [(path, i, k, f"{v:.6f}") for i, (k, v) in enumerate(found, 1)]
    if cfg.target:
        Path(cfg.target).parent.mkdir(parents=True, exist_ok=True)
        with open(cfg.target, "w", newline="") as file:
            csv.writer(file).writerows([("image", "rank", "class", "probability"), *rows])
        print(f"{cfg.target} ({len(paths)} images)")
