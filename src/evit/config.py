"""The knobs of a training run as plain data, and what run folders are called."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Of the checkout, or within an installed package.
CONF_DIR = next(conf for up in Path(__file__).parents if (conf := up / "conf").is_dir())
OUTPUTS = Path(os.environ.get("EVIT_OUTPUT", "outputs"))
HOW = (  # say how a run is run, not what is trained: they are not in its config.json
    *("overwrite", "resume", "checkpoint_every_n_steps", "keep_checkpoint_every_n_epochs"),
    "dry_run",
)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration of a run as in its config.json: resolved, the model's knobs at the root.

    A model may set its own keep_rate (model=deit: 1), which then is the run's.
    """
    knobs = [str(knob) for knob in cfg if knob != "hydra" and knob not in HOW]
    masked = OmegaConf.masked_copy(cfg, knobs)
    config: Any = OmegaConf.to_container(masked, resolve=True, throw_on_missing=True)
    config |= {k: v for k, v in config["model"].items() if k in ("keep_rate", "fusion", "img_size")}
    return config | dict(crop_pct=config["recipe"]["crop_pct"])


def scale_for(cfg: DictConfig) -> str:
    """The choice of conf/scale that fits a run's data: published for ImageNet, own, or demo."""
    root, imagenet = cfg.data.get("root"), os.environ.get("IMAGENET_DIR")
    if cfg.data.get("num_classes") == 1000:
        return "published"
    if root and imagenet and os.path.abspath(imagenet) == os.path.abspath(root):
        return "published"
    return "own" if root else "demo"


def of(share: float, whole: int, *, _parent_: Any) -> float:
    """${of:10,300} in a recipe: 10 of 300 epochs, or as large a share of recipe.epochs.

    An int gives whole epochs.
    """
    epochs = share * _parent_["epochs"] / whole
    return round(epochs) if isinstance(share, int) else epochs


def folder_name(overrides: str) -> str:
    """A folder name that says what was overridden: short ASCII without need of quotes.

    Long names are cut; short overrides come first, so that the seed and the keep rate stay in.
    """
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", overrides) or "default"
    if len(name) <= 100 and overrides.isascii():
        return name
    name = "+".join(sorted(name.split("+"), key=len))
    return f"{name[:90]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def overridden(overrides: list[str]) -> set[str]:
    """The names of what was given on the command line: {"keep_rate", "data.root", "model"}."""
    return {name[1] for text in overrides if (name := re.match(r"[+~]*([\w./-]+)", text))}


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 epoch, 2 epochs."""
    return f"{count} {noun}{'s' * (count != 1)}"


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
