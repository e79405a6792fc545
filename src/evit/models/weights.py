"""Checkpoints in: ours, and those published by the authors of DeiT and EViT."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit.files import check_zip

# Where published and Lightning checkpoints keep the weights, and what they prepend to each name.
CONTAINERS = ("model", "state_dict")
PREFIXES = ("module.", "model.")


def read_file(path: str | Path) -> Any:
    """The content of a checkpoint file, read with weights_only: nothing in it is executed."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist: give the path of a file")
    try:
        check_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {reason}") from error


def read_state_dict(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint file (or its loaded content), by plain parameter names."""
    if not isinstance(source, Mapping):
        source = read_file(source)
    for name in CONTAINERS:
        if isinstance(source, Mapping) and isinstance(source.get(name), Mapping):
            source = source[name]
            break
    if not isinstance(source, Mapping) or not any(isinstance(v, Tensor) for v in source.values()):
        raise ValueError("checkpoint holds no state dict: expected weights, or them under 'model'")
    weights = {name: value for name, value in source.items() if isinstance(value, Tensor)}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """pos_embed (1, P + N, C) of a square grid, bicubic to another one, as EViT's authors do."""
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    side = round(patches.shape[1] ** 0.5)
    if side**2 != patches.shape[1]:
        raise ValueError(f"pos_embed of {patches.shape[1]} patches is not from a square image")
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    return torch.cat([prefix, patches.to(prefix.dtype)], 1)


def fit_state_dict(weights: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """The weights of a checkpoint, by the model's names and resized to its grid."""
    fitted = read_state_dict(weights)
    renames = getattr(getattr(model, "reducer", None), "published_names", {})
    for theirs, ours in renames.items():
        fitted = {
            ours + name.removeprefix(theirs) if name.startswith(theirs) else name: value
            for name, value in fitted.items()
        }
    own, loaded = getattr(model, "pos_embed", None), fitted.get("pos_embed")
    if own is not None and loaded is not None and own.shape[1] != loaded.shape[1]:
        num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        fitted["pos_embed"] = resize_pos_embed(loaded, model.patch_embed.grid_size, num_prefix)
    return fitted


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    new_head: bool = False,
    new_parts: bool = False,
) -> None:
    """Load the weights of a checkpoint into a model of the same architecture.

    Args:
        source: a path or state dict: ours (Lightning's .ckpt; of the EMA where the run evaluated
            it), or a published one ({"model": ...}). The position embedding is resized to the
            model's image size.
        new_head: leave out a classifier whose number of classes differs from the model's.
        new_parts: leave as they are the reducer's parameters, if the checkpoint has none of them
            (DynamicViT's predictors, from a dense checkpoint).

    Raises:
        ValueError: a weight is missing, surplus or of another shape; it is named.
    """
    weights, own = fit_state_dict(read_state_dict(source), model), model.state_dict()
    wrong_shape = [k for k in own if k in weights and weights[k].shape != own[k].shape]
    if new_head:
        head = [k for k in wrong_shape if k.split(".")[0] in ("head", "aux_head", "head_dist")]
        weights |= {k: own[k] for k in head}
        wrong_shape = [k for k in wrong_shape if k not in head]
    if new_parts and not any(k.startswith("reducer.") for k in weights):
        weights |= {k: w for k, w in own.items() if k.startswith("reducer.")}
    problems = [f"{k} is {tuple(weights[k].shape)}, not {tuple(own[k].shape)}" for k in wrong_shape]
    problems += [f"{k} is missing" for k in own if k not in weights]
    problems += [f"{k} is not the model's" for k in weights if k not in own]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        hint = (
            ""
            if new_head
            else " (another number of classes alone: load_checkpoint(..., new_head=True))"
        )
        raise ValueError(
            f"checkpoint does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}. "
            f"Choose the model that it was trained with{hint}"
        )
    model.load_state_dict(weights)
