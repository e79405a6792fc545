"""Token labels of a tree of images, by a classifier that keeps a grid of features.

What TokenLabeling's generate_label.py does: the classifier is applied at every position of the last
features, and the five best classes of each position are kept (evit.data.label_maps).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from evit import load_checkpoint
from evit.data.folders import ClassFolders, class_names, cut_long, load_image
from evit.data.label_maps import (
    MAX_ID,
    TOP,
    Shape,
    label_map_paths,
    read_label_map,
)
from evit.data.module import available_cores
from evit.data.progress import shown
from evit.models import create_model

DESCRIPTION = "label_maps.json"


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

    Maps that are there already, and not older than their images, are kept: an interrupted run goes
    on.

    Args:
        model_name: timm's; its own mean, std and interpolation are used.
        pretrained: timm's weights, where no checkpoint is given.
        checkpoint: weights for as many classes as the tree has.
        img_size: pixels; None: the model's size for tests.
        crop_pct: share of the image's short side that the model sees.
        crop_mode: "squash", the whole image as a square, where training looks for its crops; or
            "center", the central square, as the authors do, and their maps of long images are off.
        num_workers: processes that read images; None: one per core.

    Raises:
        ValueError: the tree, the model or the target cannot serve; each is named.
    """
    source, target = (Path(path).expanduser().resolve() for path in (source, target))
    classes = _classes(source)
    samples = ClassFolders(source / "train", classes).samples
    images = [path for path, _ in samples]
    paths = label_map_paths(images, source / "train", target)
    if crop_mode not in ("center", "squash") or not 0 < crop_pct <= 1:
        raise ValueError(f"crop_mode={crop_mode}, crop_pct={crop_pct}: center or squash, in (0, 1]")

    model = annotator(model_name, len(classes), pretrained, checkpoint, img_size)
    config = resolve_model_data_config(
        model, dict(img_size=img_size), use_test_size=not _fixed_size(model)
    )
    config |= dict(crop_pct=crop_pct, crop_mode=crop_mode)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    size = config["input_size"]
    with torch.inference_mode():
        found = dense_logits(model, torch.zeros(1, *size, device=device))
    shape = found.shape[2], found.shape[3]
    weights = "timm's" if checkpoint is None else str(Path(checkpoint).expanduser().resolve())
    _describe(
        target,
        dict(
            model_name=model_name,
            weights=weights,
            img_size=list(size[1:]),
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            classes=len(classes),
            cells=list(shape),
        ),
    )

    pairs = enumerate(zip(images, paths, strict=True))
    missing = [i for i, pair in pairs if not _is_good(*pair, len(classes), shape)]
    print(
        f"{len(paths)} images in {len(classes)} classes, {len(paths) - len(missing)} have their "
        f"label maps already: {model_name} at {size[1]} x {size[2]} px gives maps of {shape[0]} x "
        f"{shape[1]} cells",
        flush=True,
    )
    loader = DataLoader(
        Pictures([images[i] for i in missing], create_transform(**config), crop_mode == "center"),
        batch_size,
        num_workers=available_cores() if num_workers is None else num_workers,
        pin_memory=device.type == "cuda",
    )
    written = _write(model, loader, [paths[i] for i in missing], device)
    for _ in shown(written, len(missing), "Writing label maps"):
        pass
    return target


class Pictures(Dataset):
    """Image files, transformed; `cut`: of extremely long ones the middle."""

    def __init__(self, paths: list[str], transform: Any, cut: bool):
        self.paths, self.transform, self.cut = paths, transform, cut

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        image = load_image(self.paths[i])
        return self.transform(cut_long(image) if self.cut else image)


def _classes(source: Path) -> list[str]:
    if not (source / "train").is_dir():
        raise ValueError(f"{source} has no train/: expected {source}/train/CLASS/*.jpg")
    classes = class_names(source / "train")
    if not TOP <= len(classes) <= MAX_ID + 1:
        raise ValueError(
            f"{source}/train has {len(classes)} classes: a label map holds the {TOP} best of at "
            f"least {TOP} and at most {MAX_ID + 1}"
        )
    return classes


def annotator(
    name: str,
    num_classes: int,
    pretrained: bool,
    checkpoint: str | Path | None,
    img_size: int | None,
) -> nn.Module:
    """The classifier, with its weights, and with all of its tokens if it could do with fewer.

    Raises:
        ValueError: it has no weights, or is for another number of classes.
    """
    if checkpoint is None and not pretrained:
        raise ValueError(
            f"{name} without weights knows nothing: give checkpoint=PATH, or pretrained=true"
        )
    options: dict[str, Any] = dict(num_classes=num_classes) if checkpoint else {}
    try:
        sized = dict(img_size=img_size) if img_size else {}
        model: Any = create_model(name, checkpoint is None, **options, **sized)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = create_model(name, checkpoint is None, **options)  # of images of any size
    if checkpoint:
        load_checkpoint(model, checkpoint)
    elif model.num_classes != num_classes:
        raise ValueError(
            f"{name} knows {model.num_classes} classes and the tree has {num_classes}: give "
            f"checkpoint=PATH of one that was trained on these classes"
        )
    if hasattr(model, "set_keep_rate"):
        model.set_keep_rate(1.0)
    return model


def dense_logits(model: Any, images: Tensor) -> Tensor:
    """Logits (B, K, H, W): the classifier applied at every position of the last features.

    LV-ViT has a classifier for its positions, which is taken. For any other model the head is given
    the features of one position as if they were all: pooling then changes nothing.

    Raises:
        ValueError: the features of this model are no grid.
    """
    features = model.forward_features(images)
    channels, K = model.num_features, model.num_classes
    name = type(model).__name__
    wrong = (
        f"{name} has no spatial features: label maps need a classifier that keeps a grid of them"
    )
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise ValueError(wrong)
    B = len(features)
    if features.ndim == 3:
        prefix = getattr(model, "num_prefix_tokens", 0)
        tokens_BNC = features[:, prefix:]
        rows, columns = _grid(model, tokens_BNC.shape[1])
        if rows * columns != tokens_BNC.shape[1] or tokens_BNC.shape[2] != channels:
            raise ValueError(wrong)
        aux_head = getattr(model, "aux_head", None)
        if aux_head is not None:
            logits = aux_head(tokens_BNC.flatten(0, 1))
        else:
            one = tokens_BNC.reshape(-1, 1, channels)
            logits = model.forward_head(one.expand(-1, prefix + 1, -1))
    elif features.shape[1] == channels:
        rows, columns = features.shape[2:]
        logits = model.forward_head(features.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1))
    elif features.shape[3] == channels:
        rows, columns = features.shape[1:3]
        logits = model.forward_head(features.reshape(-1, 1, 1, channels))
    else:
        raise ValueError(wrong)
    if rows * columns == 1:
        raise ValueError(wrong)
    if tuple(logits.shape) != (B * rows * columns, K):
        raise ValueError(f"{name}'s classifier cannot be applied to one position of its features")
    return logits.reshape(B, rows, columns, K).permute(0, 3, 1, 2)


def _grid(model: Any, num_tokens: int) -> Shape:
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and grid[0] * grid[1] == num_tokens:
        return tuple(grid)
    side = round(num_tokens**0.5)
    return side, side


def _fixed_size(model: Any) -> bool:
    return bool(getattr(model, "pretrained_cfg", {}).get("fixed_input_size"))


def _describe(target: Path, description: dict[str, Any]) -> None:
    """Write down how the maps of a folder are made, or refuse to mix them with others.

    Raises:
        ValueError: the folder's maps were made in another way.
    """
    path = target / DESCRIPTION
    if path.is_file():
        before = json.loads(path.read_text())
        other = [key for key in description if before.get(key) != description[key]]
        if other:
            raise ValueError(
                f"{target} holds label maps with {other[0]} {before.get(other[0])}, not "
                f"{description[other[0]]}: choose another target, or delete it"
            )
        return
    target.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(description, indent=1))


def _is_good(image: str, path: str, num_classes: int, shape: Shape) -> bool:
    """Whether a label map is there, whole, and not older than its image."""
    try:
        read_label_map(path, num_classes, shape)
        return os.path.getmtime(path) >= os.path.getmtime(image)
    except (ValueError, OSError):
        return False


@torch.inference_mode()
def _write(
    model: nn.Module, loader: DataLoader, paths: list[str], device: torch.device
) -> Iterator[str]:
    """Write the label maps of the loader's images, and yield each path."""
    targets = iter(paths)
    for images in loader:
        logits, ids = dense_logits(model, images.to(device, non_blocking=True)).topk(TOP, dim=1)
        maps = torch.stack([logits, ids], 1).half().cpu()
        if not maps.isfinite().all():
            raise ValueError("the model's logits are not finite, or too large for float16")
        for label_map in maps:
            path = Path(next(targets))
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            torch.save(label_map.clone(), partial)
            os.replace(partial, path)
            yield str(path)


def run(cfg: Any) -> None:
    """What src/label_maps.py does."""
    make_label_maps(**cfg)
