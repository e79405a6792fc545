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
    """Predict by a composed configuration: images of a folder, or those that are named.

    Raises:
        ValueError: the configuration cannot be served, or an image cannot be read.
    """
    if cfg.top < 1 or cfg.batch_size < 1:
        raise ValueError(f"top={cfg.top} and batch_size={cfg.batch_size} must be at least 1")
    paths = image_paths(cfg.images)
    model, about, cfg, _ = checkpoint.opened(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = about["classes"] or [f"class {label}" for label in range(model.num_classes)]
    if names[0] in ("class 0", "n01440764") and len(names) == 1000:  # ImageNet's
        names = ImageNetInfo().label_descriptions()
    crop, rows = evaluation_transform(cfg.img_size, cfg.crop_pct), []
    model = model.to(device)
    for start in range(0, len(paths), cfg.batch_size):
        some = paths[start : start + cfg.batch_size]
        pixels = torch.stack([crop(load_image(path)) for path in some]).to(device)
        probabilities = model(normalize(pixels, about["mean"], about["std"])).softmax(1)
        best = probabilities.topk(min(cfg.top, len(names)), 1)
        for path, shares, labels in zip(
            some, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            found = [(names[label], share) for label, share in zip(labels, shares, strict=True)]
            rows += [(path, i, name, f"{share:.6f}") for i, (name, share) in enumerate(found, 1)]
            print(
                f"{path}: " + ", ".join(f"{name} {share:.1%}" for name, share in found), flush=True
            )
    if cfg.target:
        Path(cfg.target).parent.mkdir(parents=True, exist_ok=True)
        with open(cfg.target, "w", newline="") as file:
            csv.writer(file).writerows([("image", "rank", "class", "probability"), *rows])
        print(f"{cfg.target} ({len(paths)} images)")
