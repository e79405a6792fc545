"""Token labels: maps of a strong classifier's five best classes, and training targets from them.

The format is that of TokenLabeling (arXiv 2104.10858): for each training image one file
LABELS/CLASS/STEM.pt, a float16 tensor (2, 5, H, W) with the five highest logits of each cell of the
image, and the ids of their classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import roi_align

TOP = 5
MAX_ID = 2048  # up to here float16 holds every integer

Shape = tuple[int, int]


def refusal(path: str | Path, reason: str) -> ValueError:
    """What is wrong with a label map, and the way out."""
    return ValueError(
        f"label map {path}: {reason}; make it again: delete the file and run "
        f"python src/label_maps.py source=DIR target=LABELS"
    )


def label_map_paths(images: Sequence[str], root: Path, label_maps: Path) -> list[str]:
    """Where the label map of each image is: root/CLASS/a.jpg -> label_maps/CLASS/a.pt.

    Raises:
        ValueError: two images would share a map.
    """
    found: dict[str, str] = {}
    for image in images:
        stem, _ = os.path.splitext(os.path.relpath(image, root))
        path = os.path.join(label_maps, f"{stem}.pt")
        if path in found:
            raise ValueError(
                f"{found[path]} and {image} would share the label map {path}: rename one of them"
            )
        found[path] = image
    return list(found)


def require_label_maps(paths: Sequence[str]) -> None:
    """Raise ValueError if one of the files is not there."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} training images have no label map, {missing[0]} is "
            f"the first: make the maps with python src/label_maps.py source=DIR target=LABELS"
        )


def read_label_map(path: str | Path, num_classes: int, shape: Shape | None = None) -> Tensor:
    """A label map (2, 5, H, W), float16, of `num_classes` classes.

    Raises:
        ValueError: it is missing, damaged, or not of `shape` (H, W) where one is given.
    """
    path = Path(path)
    if not path.is_file():
        raise refusal(path, "no such file")
    try:
        label_map = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and zip raise nearly anything on a bad file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise refusal(path, f"not readable ({reason})") from None
    if not isinstance(label_map, Tensor) or label_map.dtype != torch.float16:
        kind = getattr(label_map, "dtype", type(label_map).__name__)
        raise refusal(path, f"{kind}, not a float16 tensor")
    size = tuple(label_map.shape)
    if len(size) != 4 or size[:2] != (2, TOP) or 0 in size:
        raise refusal(path, f"of shape {size}, not (2, {TOP}, H, W)")
    if shape is not None and size[2:] != tuple(shape):
        raise refusal(
            path, f"of {size[2]} x {size[3]} cells, the first map of this data set of "
            f"{shape[0]} x {shape[1]}, and all must be alike",
        )  # fmt: skip
    check_label_map(path, label_map, num_classes)
    return label_map.contiguous()


def check_label_map(path: Path, label_map: Tensor, num_classes: int) -> None:
    """Raise ValueError for logits that are not finite, or ids that are no classes."""
    logits, ids = label_map.numpy().astype("f4")
    if not (abs(logits) < float("inf")).all():
        raise refusal(path, "it has logits that are not finite")
    if not ((ids >= 0) & (ids < min(num_classes, MAX_ID + 1)) & (ids % 1 == 0)).all():
        raise refusal(path, f"it has ids that are not classes, 0 to {num_classes - 1}")


@torch.no_grad()
def token_targets(
    maps: Tensor,
    crops: Tensor,
    num_classes: int,
    grid_size: int | Shape,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The soft labels of cropped images, and of each of their patches.

    The logits of a map, zero outside the five best classes, are averaged over each patch of the
    crop (RoIAlign, as TokenLabeling does) and then turned into probabilities. The published code
    swaps the axes of the crop and scales both by the map's width; here both are right.

    Args:
        maps: (B, 2, 5, H, W), top-5 logits and their class ids.
        crops: (B, 5), x0, y0, x1, y1 as shares of the image's width and height, and 1 where the
            crop was mirrored.
        grid_size: patches of a side, or (rows, columns).
        label_smoothing: share of the probability that is spread over all classes.

    Returns:
        (B, K) targets of the class token, and (B, N, K) of the patches, row-major; float32.
    """
    B, _, _, H, W = maps.shape
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    logits_BKHW = torch.zeros(B, num_classes, H, W, device=maps.device)
    logits_BKHW.scatter_(1, maps[:, 1].long(), maps[:, 0].float())

    # The centre of the first cell is 0 for RoIAlign, and half a cell inside the image.
    size = torch.tensor([W, H, W, H], device=maps.device)
    boxes = list((crops[:, :4].to(maps.device).float() * size - 0.5).split(1))
    cells_BKhw = roi_align(logits_BKHW, boxes, (rows, columns))
    mirrored_B = crops[:, 4].to(maps.device).bool().view(B, 1, 1, 1)
    cells_BKhw = torch.where(mirrored_B, cells_BKhw.flip(3), cells_BKhw)
    whole_BK = roi_align(logits_BKHW, boxes, 1).flatten(1)

    def smooth(targets: Tensor) -> Tensor:
        return targets * (1 - label_smoothing) + label_smoothing / num_classes

    class_targets = smooth(whole_BK.softmax(1))
    return class_targets, smooth(cells_BKhw.flatten(2).softmax(1).transpose(1, 2))
