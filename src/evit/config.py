"""The knobs of a training run: the recipe with its checks, plain data, names of run folders."""

import hashlib
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

# Of the checkout, or within an installed package.
CONF_DIR = next(conf for up in Path(__file__).parents if (conf := up / "conf").is_dir())
OUTPUTS = Path(os.environ.get("EVIT_OUTPUT", "outputs"))
# How a run is run, not what is trained: these knobs are not in its config.json.
HOW = "overwrite resume checkpoint_every_n_steps keep_checkpoint_every_n_epochs dry_run".split()
FROM_1 = (  # numbers that begin at 1, the others at 0
    "epochs batch_size lr_batch_size eval_every repeated_augmentations token_multiple "
    "max_train_images max_val_images max_batch_per_process"
).split()
TO_1 = "ema_decay mixup_switch_prob random_erasing flip drop_path label_smoothing crop_pct".split()
NAMES = dict(lr_schedule=("plain", "timm", "deit"), mixup_mode=("batch", "pair", "elem"))


@dataclass
class Recipe:
    """Knobs of training; the published values are in conf/recipe/."""

    epochs: int = MISSING
    batch_size: int = MISSING  # images per optimizer step, over all processes
    max_batch_per_process: int | None = None  # it accumulates the rest; null: no limit
    finetune: bool = False  # starts from trained weights, never from random ones
    train_in_eval_mode: bool = False  # as EViT's finetune.sh: no drop path
    lr: float = MISSING
    lr_batch_size: int | None = None  # lr is per this many images of batch; null: lr as it stands
    lr_schedule: str = "plain"  # at every step; or epoch by epoch, as timm or deit step it
    min_lr: float = 1e-5
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6
    cooldown_epochs: float = 0  # the last ones, at min_lr
    backbone_lr: float = 1.0  # DynamicViT: share of lr of all but the predictors
    backbone_frozen_epochs: float = 0  # the first ones, in which these alone learn
    frozen: list[str] = field(default_factory=list)  # parameters that stay as they are
    weight_decay: float = 0.05
    clip_grad: float | None = None
    ema_decay: float | None = None
    ema_evaluated: bool = True  # the average is the result; else the trained weights are
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"  # one draw for a batch, a pair or each image (elem)
    rand_augment: str | None = None  # as timm writes it: rand-m9-mstd0.5-inc1
    random_erasing: float = 0.0  # probability
    repeated_augmentations: int = 1  # views of an image in an epoch, which has fewer images then
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    flip: float = 0.5
    crop_pct: float = 0.875  # evaluation: short side resized to img_size / crop_pct, then cropped
    any_rate: list[float] | None = None  # keep rates of one checkpoint: each step draws one
    shrink_start_epoch: int = 0
    shrink_epochs: int = 0
    token_multiple: int | None = None  # while the keep rate moves; null: 1, with compile=true 8
    token_label_weight: float = 1.0  # of the dense loss of token labels, beside the class loss
    ratio_weight: float = 2.0  # DynamicViT: of the distance to the shares of tokens to keep
    distill_weight: float = 0.5  # of what the dense teacher says
    teacher: str | None = None  # its weights; null: none, DynamicViT: checkpoint=
    eval_every: int = 1  # epochs; the last is always evaluated
    max_train_images: int | None = None
    max_val_images: int | None = None

    def __post_init__(self) -> None:
        for knob, value in vars(self).items():
            low = 0.01 if knob == "crop_pct" else int(knob in FROM_1)
            high = 1 if knob in TO_1 else math.inf
            if isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"recipe.{knob} must be from {low} to {high}, got {value}")
            if knob in NAMES and value not in NAMES[knob]:
                raise ValueError(f"recipe.{knob} must be {', '.join(NAMES[knob])}, got {value!r}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"recipe.crop_scale must be two shares, got {list(self.crop_scale)}")
        rates = self.any_rate
        if rates is not None and (len({*rates}) < 2 or not all(0 < rate <= 1 for rate in rates)):
            raise ValueError(f"recipe.any_rate must be two keep rates or more, got {list(rates)}")
        for names in ("warmup_epochs cooldown_epochs", "shrink_start_epoch shrink_epochs"):
            parts = {f"recipe.{name}": getattr(self, name) for name in names.split()}
            if sum(parts.values()) >= self.epochs:
                raise ValueError(f"{parts} leave nothing of recipe.epochs={self.epochs}")

    @property
    def full_rate_epoch(self) -> int:
        return self.shrink_start_epoch + self.shrink_epochs

    @property
    def peak_lr(self) -> float:
        return self.lr * (self.batch_size / self.lr_batch_size if self.lr_batch_size else 1)

    def accumulation(self, processes: int) -> int:
        """Batches that each process accumulates for a step: the fewest that fit and are equal."""
        share, left = divmod(self.batch_size, processes)
        limit = self.max_batch_per_process or share
        even = (n for n in range(1, share + 1) if share % n == 0 and share // n <= limit)
        return 1 if left else next(even, 1)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration of a run as in its config.json: resolved, the model's knobs at the root."""
    masked = OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k not in ("hydra", *HOW)])
    config: Any = OmegaConf.to_container(masked, resolve=True, throw_on_missing=True)
    config |= {k: v for k, v in config["model"].items() if k in ("keep_rate", "fusion", "img_size")}
    return config | dict(crop_pct=config["recipe"]["crop_pct"])


def scale_of(cfg: DictConfig) -> list[str]:
    """The override that a run's data need: none for ImageNet, scale=own, or scale=demo."""
    given = "scale" in overridden(cfg.hydra.overrides.task)
    root, imagenet = cfg.data.get("root"), os.environ.get("IMAGENET_DIR")
    same = root and imagenet and os.path.abspath(imagenet) == os.path.abspath(root)
    if given or same or cfg.data.get("num_classes") == 1000:
        return []
    return ["scale=own" if root else "scale=demo"]


def of(share: float, whole: int, *, _parent_: Any) -> float:
    """${of:10,300} in a recipe: 10 of 300 epochs, or that share; an int gives whole epochs."""
    epochs = share * _parent_["epochs"] / whole
    return round(epochs) if isinstance(share, int) else epochs


def knob_lines(config: str) -> str:
    """${knob_lines:config} in a help text: the knobs of conf/CONFIG.yaml with their comments."""
    section = (CONF_DIR / f"{config}.yaml").read_text().split("\n\n")[1]
    return section.removesuffix("\nmodel: {}").replace("$", "$$")  # Hydra substitutes $NAME


def choices(group: str) -> str:
    """${choices:model} in a help text: the names of the files in conf/model/."""
    return ", ".join(sorted(path.stem for path in (CONF_DIR / group).glob("[!_]*.yaml")))


def folder_name(overrides: str) -> str:
    """A folder name that says what was overridden: ASCII, and the shortest first if it is cut."""
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", overrides) or "default"
    if len(name) <= 100 and overrides.isascii():
        return name
    name = "+".join(sorted(name.split("+"), key=len))
    return f"{name[:90]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


RESOLVERS = (folder_name, of, knob_lines, choices)  # that conf/ uses


def overridden(overrides: list[str]) -> set[str]:
    """Names of the knobs given on the command line: {"keep_rate", "data.root", "model"}."""
    return {name[1] for text in overrides if (name := re.match(r"[+~]*([\w./-]+)", text))}


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
