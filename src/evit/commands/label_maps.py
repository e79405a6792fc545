"""Token labels of a tree of images, by a classifier that keeps a grid of features.

What TokenLabeling's generate_label.py does: the classifier is applied at every position of the last
features, and the five best classes of each position are kept (evit.data.label_maps).
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from evit import load_checkpoint
from evit.data.folders import ClassFolders, class_names, cut_long, load_image
from evit.data.label_maps import MAX_ID, TOP, label_map_paths, read_label_map
from evit.data.module import available_cores
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
    if not (source / "train").is_dir():
        raise ValueError(f"{source} has no train/: expected {source}/train/CLASS/*.jpg")
    classes = class_names(source / "train")
    if not TOP <= len(classes) <= MAX_ID + 1:
        raise ValueError(
            f"{source}/train has {len(classes)} classes: a label map holds the {TOP} best of at "
            f"least {TOP} and at most {MAX_ID + 1}"
        )
    images = [path for path, _ in ClassFolders(source / "train", classes).samples]
    paths = label_map_paths(images, source / "train", target, needed=False)

    model = annotator(model_name, len(classes), pretrained, checkpoint, img_size)
    fixed = bool(getattr(model, "pretrained_cfg", {}).get("fixed_input_size"))
    config = resolve_model_data_config(model, dict(img_size=img_size), use_test_size=not fixed)
    config |= dict(crop_pct=crop_pct, crop_mode=crop_mode)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    size = config["input_size"]
    with torch.inference_mode():
        found = dense_logits(model, torch.zeros(1, *size, device=device))
    shape = found.shape[2], found.shape[3]
    description = dict(
        model_name=model_name,
        weights=str(Path(checkpoint).expanduser().resolve()) if checkpoint else "timm's",
        img_size=list(size[1:]),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        classes=len(classes),
        cells=list(shape),
    )
    _describe(target / "label_maps.json", description)

    def is_good(image: str, path: str) -> bool:
        try:
            read_label_map(path, len(classes), shape)
            return os.path.getmtime(path) >= os.path.getmtime(image)
        except (ValueError, OSError):
            return False

    missing = [pair for pair in zip(images, paths, strict=True) if not is_good(*pair)]
    print(
        f"{len(paths)} images in {len(classes)} classes, {len(paths) - len(missing)} have their "
        f"label maps already: {model_name} at {size[1]} x {size[2]} px gives maps of {shape[0]} x "
        f"{shape[1]} cells",
        flush=True,
    )
    transform = create_transform(**config)
    loader = DataLoader(
        Pictures(missing, transform, crop_mode == "center"),
        batch_size,
        num_workers=available_cores() if num_workers is None else num_workers,
    )
    for batch, names in track(loader, f"Writing {len(missing)} label maps"):
        with torch.inference_mode():
            logits, ids = dense_logits(model, batch.to(device)).topk(TOP, dim=1)
        maps = torch.stack([logits, ids], 1).half().cpu()
        if not maps.isfinite().all():
            raise ValueError("the model's logits are not finite, or too large for float16")
        for label_map, name in zip(maps, names, strict=True):
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.tmp")
            torch.save(label_map.clone(), partial)
            os.replace(partial, path)
    return target


class Pictures(Dataset):
    """Images, transformed, with the paths of their maps; `cut`: of very long ones the middle."""

    def __init__(self, pairs: list[tuple[str, str]], transform: Any, cut: bool):
        self.pairs, self.transform, self.cut = pairs, transform, cut

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        image = load_image(self.pairs[i][0])
        return self.transform(cut_long(image) if self.cut else image), self.pairs[i][1]


def annotator(
    name: str,
    num_classes: int,
    pretrained: bool,
    checkpoint: str | Path | None,
    img_size: int | None,
) -> nn.Module:
    """The classifier, with its weights, and with all of its tokens if it could do with fewer."""
    if checkpoint is None and not pretrained:
        raise ValueError(
            f"{name} without weights knows nothing: give checkpoint=PATH, or pretrained=true"
        )
    options: dict[str, Any] = dict(num_classes=num_classes) if checkpoint else {}
    sized = dict(img_size=img_size) if img_size else {}
    try:
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
    """
    features = model.forward_features(images)
    channels, B, K = model.num_features, len(images), model.num_classes
    name, rows, columns = type(model).__name__, 1, 1
    if features.ndim == 3 and features.shape[2] == channels:
        prefix = getattr(model, "num_prefix_tokens", 0)
        tokens_BNC = features[:, prefix:]
        count = tokens_BNC.shape[1]
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        rows, columns = grid if grid and grid[0] * grid[1] == count else [round(count**0.5)] * 2
        if hasattr(model, "aux_head"):
            logits = model.aux_head(tokens_BNC.flatten(0, 1))
        else:
            one = tokens_BNC.reshape(-1, 1, channels)
            logits = model.forward_head(one.expand(-1, prefix + 1, -1))
    elif features.ndim == 4 and features.shape[1] == channels:
        rows, columns = features.shape[2:]
        logits = model.forward_head(features.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1))
    elif features.ndim == 4 and features.shape[3] == channels:
        rows, columns = features.shape[1:3]
        logits = model.forward_head(features.reshape(-1, 1, 1, channels))
    if rows * columns == 1:
        raise ValueError(
            f"{name} has no spatial features: label maps need a classifier that keeps a grid of "
            f"them"
        )
    if tuple(logits.shape) != (B * rows * columns, K):
        raise ValueError(f"{name}'s classifier cannot be applied to one position of its features")
    return logits.reshape(B, rows, columns, K).permute(0, 3, 1, 2)


def _describe(path: Path, description: dict[str, Any]) -> None:
    """Write down how the maps of a folder are made; raise ValueError for maps of another way."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(description, indent=1))
    before = json.loads(path.read_text())
    for key, value in description.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path.parent} holds label maps with {key} {before.get(key)}, not {value}: "
                f"choose another target, or delete it"
            )


def run(cfg: Any) -> None:
    """What src/label_maps.py does."""
    make_label_maps(**cfg)
