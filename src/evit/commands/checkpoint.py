"""A model and its weights, with the knobs of the run that left them: for every command."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from evit import load_checkpoint, reduce
from evit.config import folder_name, overridden
from evit.data.batch import MEAN, STD
from evit.models.weights import fit_state_dict, read_file, read_state_dict
from evit.recipe import Recipe
from evit.reducers import REDUCERS
from evit.report import results
from evit.report.evaluations import rate

# For checkpoints that are not a run's, where nothing is given.
DEFAULTS = dict(keep_rate=0.7, fusion=True, img_size=224, crop_pct=0.875, max_val_images=None)


@dataclass
class Source:
    """A checkpoint: its weights, its run's knobs and model; all empty without a checkpoint."""

    path: Path | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    model: str | None = None  # its name in conf/model, or timm's


def given() -> set[str]:
    """The names of what was given on the command line."""
    return overridden(HydraConfig.get().overrides.task)


def open_source(checkpoint: str | None) -> Source:
    """Read a checkpoint file, or the best one of a run's folder; its knobs are in both."""
    if not checkpoint:
        return Source()
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        path = path / "checkpoints/best.ckpt"
    content = read_file(path)
    inside = content.get("evit") if isinstance(content, dict) else None
    run = results.harmless(json.dumps(inside or {})) | results.run_config(path)
    folder = results.run_folder(path)
    finished = folder and results.finished(folder)
    name = finished["choices"]["model"] if finished else run.get("model", {}).get("model_name")
    return Source(path, read_state_dict(content), run, name)


def complete(cfg: DictConfig, source: Source) -> DictConfig:
    """Fill in the model, its reducer, its data and the knobs that are null: the run's, or defaults.

    Raises:
        ValueError: no model is given, or crop_pct is out of range.
    """
    cfg, names, run = cfg.copy(), given(), source.run
    dense = cfg.model.get("reducer", None) is None and "reducer" not in names
    if "_target_" not in cfg.model:
        if not run:
            why = f"{source.path} is not a run's, which would tell" if source.path else "or a run's"
            raise ValueError(f"model=NAME is needed, as in model=evit_deit: {why}")
        cfg.model = OmegaConf.merge(run["model"], cfg.model)
        if "reducer" not in names and "reducer" in run["model"]:
            dense = run["model"]["reducer"] is None
            changed = {k: v for k, v in cfg.reducer.items() if f"reducer.{k}" in names}
            cfg.reducer = cfg.reducer if dense else run["model"]["reducer"] | changed
    knobs = DEFAULTS | run | (dict(keep_rate=1.0) if dense else {})
    if size := cfg.model.get("img_size"):  # the model's own, or the run's, not ${img_size}
        knobs["img_size"] = size
    for knob in ("keep_rate", "fusion", "img_size", "crop_pct"):
        if knob in cfg and cfg[knob] is None:
            cfg[knob] = knobs[knob]
        if knob in cfg.reducer and f"reducer.{knob}" not in names:
            cfg.reducer[knob] = cfg[knob]
    if not 0.01 <= cfg.get("crop_pct", 1) <= 1:
        raise ValueError(f"crop_pct must be from 0.01 to 1, got {cfg.crop_pct}")
    wanted = dict(
        reducer=cfg.reducer, img_size=cfg.img_size, pretrained=bool(cfg.get("pretrained"))
    )
    for knob in wanted.keys() & cfg.model.keys():
        cfg.model[knob] = wanted[knob]
    own = run.get("data")
    if "data" in cfg and isinstance(own, dict) and "data" not in names:
        changed = {name: cfg.data[name] for name in cfg.data if f"data.{name}" in names}
        cfg.data = OmegaConf.merge(own, changed)
    elif "data" in cfg and "data.backend" not in names:
        root = Path(cfg.data.get("root") or "").expanduser()
        cfg.data.backend = "ffcv" if (root / "val.beton").is_file() else "imagefolder"
    if "img_size" in cfg.get("data", {}):
        cfg.data.img_size = cfg.img_size
    return cfg


def validation(cfg: DictConfig, batch_size: int, **limits: Any) -> Any:
    """The data module of validation images alone; nothing is read yet."""
    options: Any = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    recipe = Recipe(epochs=1, lr=1, batch_size=batch_size, crop_pct=cfg.crop_pct, **limits)
    return instantiate(options, recipe=recipe, splits=["val"], _convert_="object")


def require_classes(source: Source, data: Any) -> None:
    """Refuse data of other classes than the checkpoint's."""
    head, names = source.weights.get("head.weight"), source.run.get("classes")
    text = ""
    if head is not None and len(head) != data.num_classes:
        text = f"the checkpoint has {len(head)} classes and {data.name} has {data.num_classes}"
    elif names and names != list(data.classes):
        text = f"the checkpoint's classes, {names[0]} to {names[-1]}, are not those of {data.name}"
    if text:
        raise ValueError(f"{text}: give the data that it was trained on, data.root=DIR")


def build(model: dict[str, Any], source: Source, **options: Any) -> Any:
    """The model of a configuration, with its weights."""
    if (head := source.weights.get("head.weight")) is not None:
        options = dict(num_classes=len(head)) | options
    built = instantiate(model | options, _convert_="all")
    if source.weights:
        load(built, source)
    if hasattr(built, "reducer"):
        heed_rate(built.reducer)
    return built


def load(model: Any, source: Source) -> None:
    """Load the weights; those of a reducer that the model does not have are left out.

    Raises:
        ValueError: they do not fit, or the reducer has parameters that the checkpoint lacks.
    """
    weights, reducer = fit_state_dict(source.weights, model), getattr(model, "reducer", None)
    if reducer is not None and not reducer.state_dict():
        others = {name for kind in REDUCERS.values() for name in kind.published_names}
        weights = {k: w for k, w in weights.items() if not k.startswith(("reducer.", *others))}
    elif reducer is not None and not any(k.startswith("reducer.") for k in weights):
        raise ValueError(
            f"reducer {reducer.name} has to be trained, and {source.path} has no weights of it: "
            f"take another, or a checkpoint that was trained with it"
        )
    try:
        load_checkpoint(model, weights)
    except ValueError as error:
        had = f"; the run had model={source.model}" if source.model else ""
        raise ValueError(f"{error}{had}") from error


def attach(model: Any, reducer: dict[str, Any], source: Source) -> Any:
    """Give a model the reducer of a configuration; its weights too, where it has some."""
    reduce(model, instantiate(reducer, _convert_="all"))
    if model.reducer.state_dict():
        load(model, source)
    heed_rate(model.reducer)
    return model.reducer


def heed_rate(reducer: Any) -> None:
    """Refuse keep_rate beside counts or a schedule of the reducer's own, which win over it."""
    if (reducer.own or reducer.given) and given() & {"keep_rate", "keep_rates"}:
        raise ValueError(
            f"reducer {reducer.name} has another schedule than keep_rate: leave keep_rate out, or "
            f"choose the reducer anew, reducer={reducer.name}"
        )


def model_name(config: dict[str, Any], source: Source) -> str:
    """The model's name in conf/model: as chosen, or as the checkpoint's run had it."""
    chosen = HydraConfig.get().runtime.choices.get("model")
    named = source.model or config["model"].get("model_name", "model")
    return chosen if chosen and chosen != "null" else named


def file_name(about: dict[str, Any]) -> str:
    """MODEL-KEEPRATE-SIZE, with the reducer if the model's name does not say it."""
    model, reducer = about["model"], about["reducer"] or "evit"
    named = reducer == "evit" or model.startswith(reducer)
    parts = (model, *([] if named else [reducer]), rate(about), about["img_size"])
    return folder_name("-".join(map(str, parts)))


def opened(cfg: DictConfig) -> tuple[Any, dict[str, Any], DictConfig]:
    """The model that a command is about, frozen; facts about it; the completed configuration."""
    kinds = [name for name in ("checkpoint", "pretrained", "random") if name in cfg]
    if sum(bool(cfg[name]) for name in kinds) != 1:
        ways = dict(checkpoint="checkpoint=PATH", pretrained="pretrained=true (timm's download)")
        ways |= dict(random="random=true (to try out)")
        raise ValueError(f"give the weights, one of {', '.join(ways[name] for name in kinds)}")
    source = open_source(cfg.checkpoint)
    cfg = complete(cfg, source)
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    torch.manual_seed(cfg.get("seed", 0))
    model = build(config["model"], source)
    reducer: Any = getattr(model, "reducer", None)
    wanted = (getattr(model, "pretrained_cfg", None) or dict(mean=MEAN, std=STD)) | source.run
    rates = [] if reducer is None else list(reducer.keep_rate)
    dense = set(rates) <= {1.0}
    about = dict(
        model=model_name(config, source),
        reducer=None if dense else reducer.name,
        keep_rate=rates,
        fusion=None if dense else getattr(reducer, "fusion", None),
        img_size=cfg.img_size,
        num_classes=model.num_classes,
        classes=source.run.get("classes"),
        mean=list(wanted["mean"]),
        std=list(wanted["std"]),
        checkpoint=source.path and source.path.name,
        commit=results.git_commit(),
    )
    return model.eval().requires_grad_(False), about, cfg
