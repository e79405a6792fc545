"""Predict the classes of images: their names and probabilities, printed or as a table."""

import csv
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from timm.data import ImageNetInfo

from evit.commands import checkpoint
from evit.commands.visualize import image_paths, read_pixels
from evit.data.batch import normalize


@torch.no_grad()
def run(cfg: DictConfig) -> None:
    """Predict by a composed configuration: images of a folder, or those that are named."""
    if cfg.top < 1 or cfg.batch_size < 1:
        raise ValueError(f"top={cfg.top} and batch_size={cfg.batch_size} must be at least 1")
    rows: list[Any] = [("image", "rank", "class", "probability")]
    paths = image_paths(cfg.images)
    model, about, cfg, _ = checkpoint.opened(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = about["classes"] or [f"class {label}" for label in range(model.num_classes)]
    if names[0] in ("class 0", "n01440764") and len(names) == 1000:  # ImageNet's
        names = ImageNetInfo().label_descriptions()
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
        print(f"{cfg.target} ({len(paths)} images)")
