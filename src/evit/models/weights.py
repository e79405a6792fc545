"""Load checkpoints: ours, and those published by the authors of DeiT, EViT and others."""

import argparse
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict")  # averaged weights
PREFIXES = re.compile(r"^((module|model|backbone|encoder)\.)+")
HEADS = ("head", "aux_head", "head_dist")


def read_file(path: str | Path, device: str = "cpu") -> Any:
    """Read a checkpoint file without executing anything in it; ValueError if that cannot be."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist: give the path of a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # torch.load does not check the checksums of its zip files.
        if zipfile.is_zipfile(path) and (changed := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"damaged: {changed} is not as it was written")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {reason}") from error


def read_state_dict(source: str | Path | Mapping[str, Any], ema: bool = False) -> dict[str, Tensor]:
    """Weights of a checkpoint file (or its content), by plain parameter names; averaged ones with
    ema, or if there are no others."""
    content: Any = source if hasattr(source, "items") else read_file(source)
    content = content if hasattr(content, "items") else {}
    inside = [n for n in CONTAINERS + AVERAGES if hasattr(content.get(n), "items")]
    averaged = [name for name in inside if name in AVERAGES]
    if ema and not averaged:
        raise ValueError(f"checkpoint has no average of its weights ({', '.join(AVERAGES)})")
    if averaged and not ema and inside[0] not in AVERAGES:
        warnings.warn(f"{averaged[0]} is not used: ema=True takes it", stacklevel=3)
    if inside:
        content = content[averaged[0] if ema else inside[0]]
    weights = {name: value for name, value in content.items() if torch.is_tensor(value)}
    if not weights:
        raise ValueError("checkpoint holds no state dict: expected weights, or them under 'model'")
    return {PREFIXES.sub("", name.replace("_orig_mod.", "")): w for name, w in weights.items()}


def fit_state_dict(weights: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Rename a checkpoint's weights to the model's names and resize them to its grid."""
    fitted = read_state_dict(weights)
    for theirs, ours in getattr(getattr(model, "reducer", None), "published_names", {}).items():
        fitted = {re.sub(f"^{re.escape(theirs)}", ours, name): w for name, w in fitted.items()}
    own, loaded = getattr(model, "pos_embed", None), fitted.get("pos_embed")
    if own is not None and loaded is not None and own.shape[1] != loaded.shape[1]:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        if math.isqrt(n := loaded.shape[1] - prefix) ** 2 != n:
            raise ValueError(f"pos_embed of {n} patches is not from a square image")
        how: Any = dict(num_prefix_tokens=prefix, antialias=False)  # as EViT's authors do
        grid = list(model.patch_embed.grid_size)
        fitted["pos_embed"] = resample_abs_pos_embed(loaded, grid, **how)
    return fitted


def load_checkpoint(
    model: Any, source: Any, new_head: bool = False, new_parts: bool = False, ema: bool = False
) -> None:
    """Load the weights of a checkpoint into a model of the same architecture.

    source: a path or state dict: ours (.ckpt), a published one, or .safetensors; wrapped, compiled
    or bare. The position embedding is resized to the model's image size.
    new_head: start a new classifier if the checkpoint has none or another number of classes.
    new_parts: keep the reducer's initial parameters if the checkpoint has none.
    ema: take the averaged weights, which some checkpoints contain too.
    ValueError: names the weights that are missing, surplus or of another shape."""
    model = getattr(model, "_orig_mod", model)
    weights, own = fit_state_dict(read_state_dict(source, ema), model), model.state_dict()
    head = {k: w for k, w in own.items() if k.split(".")[0] in HEADS}
    if new_head and any(k not in weights or weights[k].shape != w.shape for k, w in head.items()):
        weights = {k: w for k, w in weights.items() if k.split(".")[0] not in HEADS} | head
        print("The classifier is new: the checkpoint has none for these classes.", flush=True)
    if new_parts and not any(k.startswith("reducer.") for k in weights):
        weights |= {k: w for k, w in own.items() if k.startswith("reducer.")}
    theirs, ours = ({k: tuple(w.shape) for k, w in part.items()} for part in (weights, own))
    problems = [f"{k} is {theirs[k]}, not {s}" for k, s in ours.items() if theirs.get(k, s) != s]
    problems += [f"{k} is missing" for k in ours if k not in theirs]
    problems += [f"{k} is not the model's" for k in theirs if k not in ours]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        what = f"checkpoint does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}"
        hint = "" if new_head else " (new_head=True starts a new classifier)"
        raise ValueError(f"{what}. Choose the model that it was trained with{hint}")
    model.load_state_dict(weights)
