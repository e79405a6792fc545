"""Draw which patches of some images survive, and which become one token."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from evit.commands import checkpoint
from evit.commands.checkpoint import Source
from evit.config import listed
from evit.data.batch import normalize
from evit.data.folders import image_files, load_image
from evit.data.imagefolder import evaluation_transform
from evit.recipe import Recipe
from evit.report.evaluations import rate
from evit.report.pictures import draw_kept


def run(cfg: DictConfig) -> Path:
    """Draw by a composed configuration; the file.

    Raises:
        ValueError: the configuration cannot be served; nothing has been written.
    """
    require(cfg)
    source = checkpoint.open_source(cfg.checkpoint)
    cfg = checkpoint.complete(cfg, source)
    checkpoint.complete_crop(cfg, source)
    model, about = checkpoint.weighted(cfg, source)
    if not hasattr(model, "reducer"):
        raise ValueError(
            f"{type(model).__name__} reduces no tokens: take it with a reducer by model=timm_vit "
            f"model.model_name=NAME"
        )
    if about["reducer"] is None:
        raise ValueError("keep rate 1 keeps every patch: give another, as in keep_rate=0.7")
    target = Path(cfg.target or f"outputs/pictures/{checkpoint.file_name(about)}.png")
    pixels = read_files(cfg) if cfg.images else read_validation(cfg, source)
    print(f"Drawing {len(pixels)} images at keep rate {rate(about)}", flush=True)
    picture = draw_kept(model, normalize(pixels, about["mean"], about["std"]), pixels)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target)
    print(f"{target} ({picture.width} x {picture.height} pixels)")
    return target


def require(cfg: DictConfig) -> None:
    """Refuse what cannot be drawn, before anything is built."""
    checkpoint.require_weights(cfg)
    if cfg.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {cfg.num_images}")
    Image.init()
    if cfg.target and Image.EXTENSION.get(Path(cfg.target).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"target={cfg.target}: name an image file, such as kept.png or kept.pdf")


def read_files(cfg: DictConfig) -> Tensor:
    """The images that are named, cropped as in evaluations: uint8 (B, 3, img_size, img_size).

    Raises:
        ValueError: there is none, or one that is none; it is named.
    """
    given: Any = OmegaConf.to_object(cfg.images) if OmegaConf.is_list(cfg.images) else cfg.images
    paths: list[Path] = []
    for path in (Path(name).expanduser() for name in listed(given)):
        if path.is_dir():
            inside = [Path(name) for name in image_files(str(path))]
            paths += spread(inside, cfg.num_images)
        else:
            paths.append(path)
    if not paths:
        raise ValueError(f"images={given}: there are no images ({', '.join(IMG_EXTENSIONS)})")
    crop = evaluation_transform(cfg.img_size, cfg.crop_pct)
    return torch.stack([crop(load_image(path)) for path in paths])


def spread(values: list[Any], count: int) -> list[Any]:
    """At most so many of them, evenly spread."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def read_validation(cfg: DictConfig, source: Source) -> Tensor:
    """A fixed random choice of the validation images, uint8 (B, 3, img_size, img_size)."""
    checkpoint.complete_data(cfg, source)
    options: Any = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)
    recipe = Recipe(
        epochs=1,
        lr=1,
        batch_size=cfg.num_images,
        max_val_images=cfg.num_images,
        crop_pct=cfg.crop_pct,
    )
    data = instantiate(options, recipe=recipe, splits=["val"], _convert_="object")
    data.prepare_data()
    data.setup()
    return next(iter(data.val_dataloader()))[0]
