"""Token labels, as TokenLabeling (arXiv 2104.10858) stores them, and training targets from them.
LABELS/CLASS/STEM.pt is a float16 tensor (2, 5, H, W): five logits of a cell, and their classes."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WAY_OUT = "make it as TokenLabeling does, LABELS/CLASS/STEM.pt"


def label_map_paths(samples: Any, root: Path, label_maps: Path) -> list[str]:
    """Where the label map of each (image, label) is: root/CLASS/a.jpg -> label_maps/CLASS/a.pt."""
    found: dict[str, str] = {}
    for image, _ in samples:
        path = os.path.join(label_maps, os.path.splitext(os.path.relpath(image, root))[0] + ".pt")
        if path in found:
            raise ValueError(f"{found[path]} and {image} would share {path}: rename one of them")
        found[path] = image
    if missing := [path for path in found if not os.path.isfile(path)]:
        count = f"{len(missing)} of {len(found)} training images"
        raise ValueError(f"{count} have no label map, as {missing[0]}: {WAY_OUT}")
    return list(found)


def read_label_map(path: str | Path, num_classes: int, shape: Any = None) -> Tensor:
    """A label map (2, 5, H, W), float16; ValueError where it is damaged or of another shape."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        wanted = (2, 5, *(shape or found.shape[2:]))
        if found.dtype != torch.float16 or found.ndim != 4 or found.shape != wanted:
            raise ValueError(f"{found.dtype} {tuple(found.shape)}, not float16 {wanted}")
        logits, ids = found.float()
        last = min(num_classes - 1, 2048)  # up to here float16 holds every integer
        good = logits.isfinite() & (ids >= 0) & (ids <= last) & (ids % 1 == 0)
        if not good.all():
            raise ValueError(f"logits not finite, or ids that are not classes, 0 to {last}")
    except Exception as error:  # pickle and zip raise nearly anything on a bad file
        reason = f"cannot be read ({type(error).__name__}: {error})".splitlines()[0]
        raise ValueError(f"label map {path} {reason}: delete it, and {WAY_OUT}") from None
    return found.contiguous()


@torch.no_grad()
def token_targets(
    maps: Tensor, crops: Tensor, num_classes: int, grid: Any, label_smoothing=0.0, warps: Any = None
) -> tuple[Tensor, Tensor]:
    """Soft labels of cropped images (B, K) and, row by row, of each of their patches (B, N, K).

    The logits of a map, zero outside the five best classes, are averaged over each patch of the
    crop (at the points of RoIAlign, as TokenLabeling does) and then turned into probabilities. The
    published code swaps the crop's axes and scales both by the map's width; here both are right.
    maps, crops and warps are those of FFCVStream. What lies outside a crop has logits of 0."""
    B, _, _, H, W = maps.shape
    logits_BKHW = torch.zeros(B, num_classes, H, W, device=maps.device)
    logits_BKHW.scatter_(1, maps[:, 1].long(), maps[:, 0].float())
    warps = torch.eye(2, 3, device=maps.device).expand(B, 2, 3) if warps is None else warps
    x, y = warps.unbind(1)
    mirrored = torch.tensor([0.0, 0.0, 1.0], device=maps.device) - x
    warps = torch.stack([torch.where(crops[:, 4:] > 0, mirrored, x), y], 1)

    def labels(grid: tuple[int, int]) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            found = patch_logits(logits_BKHW, crops[:, :4], warps, grid)
        targets = found.flatten(2).transpose(1, 2).softmax(2)
        return targets * (1 - label_smoothing) + label_smoothing / num_classes

    return labels((1, 1))[:, 0], labels(grid)


def patch_logits(logits_BKHW: Tensor, boxes: Tensor, warps: Tensor, grid: Any) -> Tensor:
    """Mean the logits over each patch of the crops `boxes` (B, 4): (B, K, rows, columns). On each
    side there are as many equally spaced points as the cells that a patch covers."""
    B, K, H, W = logits_BKHW.shape
    start, extent = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    cells = torch.tensor([W, H], device=boxes.device)
    places, shares = [], []
    for axis, patches in enumerate((grid[1], grid[0])):
        length = (extent * cells * warps[:, :, axis]).norm(dim=1)  # of this side, in cells
        points = (length / patches).ceil().clamp(1).view(B, 1, 1)
        point = torch.arange(int(points.max()), device=boxes.device)
        patch = torch.arange(patches, device=boxes.device).view(1, -1, 1)
        share = torch.where(point < points, 1 / points, 0.0).expand(B, patches, -1)
        places.append(((patch + (point + 0.5) / points) / patches).flatten(1))
        shares.append(share.flatten(1))
    x, y = places[0][:, None, :], places[1][:, :, None]  # (B, points down, points across)
    shown = torch.stack(torch.broadcast_tensors(x, y, torch.ones_like(x)), -1)
    inner = torch.einsum("bdah,bxh->bdax", shown, warps)  # in the crop's unit square
    weight = shares[1][:, :, None] * shares[0][:, None, :]
    weight = weight * ((inner >= 0) & (inner <= 1)).all(-1)
    at = 2 * (start[:, None, None] + extent[:, None, None] * inner) - 1
    found = F.grid_sample(logits_BKHW, at, padding_mode="border", align_corners=False)
    found = (found * weight[:, None]).unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))
    return found.sum((3, 5))
