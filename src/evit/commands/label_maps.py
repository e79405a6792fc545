"""Make token labels of a tree of images, by a classifier that keeps a grid of features.

As TokenLabeling's generate_label.py: the classifier is applied at every position of the last
features, and the five best classes of each position are kept (evit.data.label_maps).
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import Compose

from evit import load_checkpoint
from evit.data.folders import ClassFolders, class_names, cut_long
from evit.data.label_maps import MAX_ID, TOP, label_map_paths, read_label_map
from evit.data.module import available_cores
from evit.files import followed, whole_file
from evit.models import create_model


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
    """Write TARGET/CLASS/STEM.pt for every image of SOURCE/train, and return TARGET.

    conf/label_maps.yaml says what the arguments are; the model's own mean, std and interpolation
    are used. Maps that are there already, and not older than their images, are kept.
    """
    source, target = (Path(path).expanduser().resolve() for path in (source, target))
    if crop_mode not in ("center", "squash") or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_mode={crop_mode}, crop_pct={crop_pct}: center or squash, in (0, 1]")
    classes = class_names(source / "train")
    if not TOP <= len(classes) <= MAX_ID + 1:
        raise ValueError(
            f"{source}/train has {len(classes)} classes: a label map holds the {TOP} best of at "
            f"least {TOP} and at most {MAX_ID + 1}, of {source}/train/CLASS/*.jpg"
        )
    folder = ClassFolders(source / "train", classes)
    images = [path for path, _ in folder.samples]
    paths = label_map_paths(images, source / "train", target, needed=False)

    model = annotator(model_name, len(classes), pretrained, checkpoint, img_size)
    fixed = bool(getattr(model, "pretrained_cfg", {}).get("fixed_input_size"))
    config = resolve_model_data_config(model, dict(img_size=img_size), use_test_size=not fixed)
    config |= dict(crop_pct=crop_pct, crop_mode=crop_mode)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval().requires_grad_(False)
    size = config["input_size"]
    shape = tuple(dense_logits(model, torch.zeros(1, *size, device=device)).shape[2:])
    weights = str(Path(checkpoint).expanduser().resolve()) if checkpoint else "timm's"
    description: dict[str, Any] = dict(
        model_name=model_name, weights=weights, img_size=list(size[1:])
    )
    description |= dict(crop_pct=crop_pct, crop_mode=crop_mode)
    description |= dict(classes=len(classes), cells=list(shape))
    said = target / "label_maps.json"
    if said.is_file() and (before := json.loads(said.read_text())) != description:
        raise ValueError(
            f"{target} holds label maps of {before}, not of {description}: choose another target, "
            f"or delete it"
        )
    target.mkdir(parents=True, exist_ok=True)
    said.write_text(json.dumps(description, indent=1))

    def is_good(image: str, path: str) -> bool:
        try:
            read_label_map(path, len(classes), shape)
            return os.path.getmtime(path) >= os.path.getmtime(image)
        except (ValueError, OSError):
            return False

    missing = [i for i, path in enumerate(paths) if not is_good(images[i], path)]
    print(
        f"{len(paths)} images in {len(classes)} classes, {len(paths) - len(missing)} have their "
        f"label maps already: {model_name} at {size[1]} x {size[2]} px gives maps of {shape[0]} x "
        f"{shape[1]} cells",
        flush=True,
    )
    transform, center = create_transform(**config), crop_mode == "center"
    folder.transform = Compose([cut_long, transform]) if center else transform
    workers = available_cores() if num_workers is None else num_workers
    loader: Any = DataLoader(Subset(folder, missing), batch_size, num_workers=workers)
    names = iter(missing)
    for batch, _ in followed(loader, f"Writing {len(missing)} label maps", len(loader)):
        maps = torch.stack(dense_logits(model, batch.to(device)).topk(TOP, dim=1), 1).half().cpu()
        if not maps.isfinite().all():
            raise ValueError("the model's logits are not finite, or too large for float16")
        for label_map, i in zip(maps, names, strict=False):
            path = Path(paths[i])
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                torch.save(label_map.clone(), file)
    return target


def annotator(
    name: str, num_classes: int, pretrained: bool, checkpoint: Any, img_size: int | None
) -> nn.Module:
    """Create the classifier with its weights, at keep rate 1 if it has a reducer."""
    if checkpoint is None and not pretrained:
        way = "give checkpoint=PATH, or pretrained=true"
        raise ValueError(f"{name} would have random weights: {way}")
    options: dict[str, Any] = dict(num_classes=num_classes) if checkpoint else {}
    sized = dict(img_size=img_size) if img_size else {}
    try:
        model: Any = create_model(name, checkpoint is None, **options, **sized)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = create_model(name, checkpoint is None, **options)  # takes images of any size
    if checkpoint:
        load_checkpoint(model, checkpoint)
    elif model.num_classes != num_classes:
        raise ValueError(
            f"{name} has {model.num_classes} classes and the images have {num_classes}: give "
            f"checkpoint=PATH of one that was trained on these classes"
        )
    if hasattr(model, "set_keep_rate"):
        model.set_keep_rate(1.0)
    return model


def dense_logits(model: Any, images: Tensor) -> Tensor:
    """Logits (B, K, H, W): the classifier applied at every position of the last features.

    LV-ViT has a classifier for its positions, which is taken. For any other model the head is given
    the features of one position as if they were all: pooling then changes nothing.
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
        name = type(model).__name__
        raise ValueError(f"{name} keeps no grid of features: take another ({error})") from error


def run(cfg: Any) -> None:
    """Run src/label_maps.py with a composed configuration."""
    make_label_maps(**cfg)
