"""A model and its weights, with the knobs of the run that left them: for every command."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from evit import load_checkpoint, reduce
from evit.config import folder_name, overridden
from evit.data.batch import MEAN, STD
from evit.models.weights import fit_state_dict, read_file, read_state_dict
from evit.reducers import REDUCERS
from evit.report import results
from evit.report.evaluations import rate

# For checkpoints that are not a run's, where nothing is given.
DEFAULTS = dict(keep_rate=0.7, fusion=True, img_size=224, crop_pct=0.875, max_val_images=None)


@dataclass
class Source:
    """A checkpoint: its weights, and the knobs of its run; both empty without a checkpoint."""

    path: Path | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)  # {} where no run is known


def given() -> set[str]:
    """The names of what was given on the command line."""
    return overridden(HydraConfig.get().overrides.task)


def open_source(checkpoint: str | None) -> Source:
    """Read a checkpoint file, or the best one of a run's folder.

    The knobs are those in the file, under "evit", and in the config.json of the run's folder.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    if not checkpoint:
        return Source()
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        path = path / "checkpoints/best.ckpt"
    content = read_file(path)
    run = content.get("evit") if isinstance(content, dict) else None
    run = results.harmless(json.dumps(run)) if isinstance(run, dict) else {}
    return Source(path, read_state_dict(content), run | results.run_config(path))


def complete(cfg: DictConfig, source: Source) -> DictConfig:
    """Fill in the model, its reducer and its knobs: those of the run, else by default.

    Args:
        cfg: with checkpoint, model, reducer, keep_rate, fusion and img_size.

    Raises:
        ValueError: no model is given.
    """
    cfg, names, run = cfg.copy(), given(), source.run
    dense = cfg.model.get("reducer", None) is None and "reducer" not in names
    if "_target_" not in cfg.model:
        if not run:
            raise ValueError(
                f"model=NAME is needed, as in model=evit_deit: {source.path} is not a run's, "
                f"whose config.json would tell (RUN/checkpoints/, with RUN/config.json)"
            )
        cfg.model = OmegaConf.merge(run["model"], cfg.model)
        if "reducer" not in names and "reducer" in run["model"]:
            own = run["model"]["reducer"]
            dense = own is None
            changed = {k: v for k, v in cfg.reducer.items() if f"reducer.{k}" in names}
            cfg.reducer = cfg.reducer if dense else own | changed
    knobs = DEFAULTS | run | (dict(keep_rate=1.0) if dense else {})
    if cfg.model.get("img_size"):  # a value of the model's own, not ${img_size}
        knobs["img_size"] = cfg.model.img_size
    for knob in ("keep_rate", "fusion", "img_size"):
        if knob in cfg and cfg[knob] is None:
            cfg[knob] = knobs[knob]
    for knob in ("keep_rate", "fusion"):
        if knob in cfg.reducer and f"reducer.{knob}" not in names:
            cfg.reducer[knob] = cfg[knob]
    if "reducer" in cfg.model:
        cfg.model.reducer = cfg.reducer
    if "img_size" in cfg.model:  # a run has a value, not ${img_size}
        cfg.model.img_size = cfg.img_size
    if "pretrained" in cfg.model:
        cfg.model.pretrained = bool(cfg.get("pretrained"))
    return cfg


def complete_data(cfg: DictConfig, source: Source) -> None:
    """Fill in the data, in place: the run's, where data=NAME was not given."""
    names, own = given(), source.run.get("data")
    if isinstance(own, dict) and "data" not in names:
        changed = {name: cfg.data[name] for name in cfg.data if f"data.{name}" in names}
        cfg.data = OmegaConf.merge(own, changed)
    elif "data.backend" not in names:
        root = Path(cfg.data.get("root") or "").expanduser()
        cfg.data.backend = "ffcv" if (root / "val.beton").is_file() else "imagefolder"
    if "img_size" in cfg.data:
        cfg.data.img_size = cfg.img_size


def complete_crop(cfg: DictConfig, source: Source) -> None:
    """Fill in crop_pct, in place.

    Raises:
        ValueError: it is out of range.
    """
    if cfg.crop_pct is None:
        cfg.crop_pct = (DEFAULTS | source.run)["crop_pct"]
    if not 0.01 <= cfg.crop_pct <= 1:
        raise ValueError(f"crop_pct must be from 0.01 to 1, got {cfg.crop_pct}")


def build(model: dict[str, Any], source: Source, **options: Any) -> Any:
    """The model of a configuration, with its weights.

    Raises:
        ValueError: it cannot be built so, or the weights do not fit.
    """
    if (head := source.weights.get("head.weight")) is not None:
        options = dict(num_classes=len(head)) | options
    built = instantiate(model | options, _convert_="all")
    if source.weights:
        load(built, source)
    return built


def load(model: Any, source: Source) -> None:
    """Load the weights; those of a reducer that the model does not have are left out.

    Raises:
        ValueError: they do not fit, or the reducer has parameters that the checkpoint lacks.
    """
    weights, reducer = fit_state_dict(source.weights, model), getattr(model, "reducer", None)
    if reducer is not None and not reducer.state_dict():
        others = {name for kind in REDUCERS.values() for name in kind.published_names}
        foreign = ("reducer.", *others)
        weights = {k: w for k, w in weights.items() if not k.startswith(foreign)}
    elif reducer is not None and not any(k.startswith("reducer.") for k in weights):
        raise ValueError(
            f"reducer {reducer.name} has to be trained, and {source.path} has no weights of it: "
            f"take another, or a checkpoint that was trained with it"
        )
    try:
        load_checkpoint(model, weights)
    except ValueError as error:
        had = f"; the run had model={model_name({}, source)}" if source.run else ""
        raise ValueError(f"{error}{had}") from error


def attach(model: Any, reducer: dict[str, Any], source: Source) -> Any:
    """Give a model another reducer, of a configuration; its weights too, where it has some.

    Raises:
        ValueError: it does not suit the model, or has to be trained.
    """
    reduce(model, instantiate(reducer, _convert_="all"))
    if model.reducer.state_dict():
        load(model, source)
    return model.reducer


def heed_rate(reducer: Any) -> None:
    """Refuse a keep rate where counts or a schedule of the reducer's own win over it.

    Raises:
        ValueError: one was given on the command line.
    """
    if (reducer.own or reducer.given) and given() & {"keep_rate", "keep_rates"}:
        raise ValueError(
            f"reducer {reducer.name} has another schedule than keep_rate: leave keep_rate out, or "
            f"choose the reducer anew, reducer={reducer.name}"
        )


def model_name(config: dict[str, Any], source: Source) -> str:
    """The model's name in conf/model: as chosen, or as the checkpoint's run had it."""
    chosen = HydraConfig.get().runtime.choices.get("model")
    if config and chosen and chosen != "null":
        return chosen
    folder = results.run_folder(source.path) if source.path else None
    before = results.finished(folder) if folder else None
    model = config.get("model") or source.run["model"]
    return before["choices"]["model"] if before else model.get("model_name", "model")


def file_name(about: dict[str, Any]) -> str:
    """MODEL-KEEPRATE-SIZE, with the reducer if the model's name does not say it."""
    model, reducer = about["model"], about["reducer"] or "evit"
    named = reducer == "evit" or model.startswith(reducer)
    parts = (model, *([] if named else [reducer]), rate(about), about["img_size"])
    return folder_name("-".join(map(str, parts)))


def require_weights(cfg: DictConfig) -> None:
    """Refuse to guess where the weights come from, or what the model is.

    Raises:
        ValueError: not exactly one source of weights is given, or no model.
    """
    sources = [name for name in ("checkpoint", "pretrained", "random") if cfg[name]]
    if len(sources) != 1:
        raise ValueError(
            "give the weights: checkpoint=PATH, pretrained=true (those that timm downloads) or "
            "random=true (to try out); one of them"
            + (f", not {' and '.join(sources)}" if sources else "")
        )
    if not cfg.checkpoint and "_target_" not in cfg.model:
        raise ValueError("model=NAME is needed without a checkpoint, as in model=evit_deit")


def weighted(cfg: DictConfig, source: Source) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a completed configuration, frozen, and facts about it.

    Raises:
        ValueError: the weights do not fit, or a knob is out of range.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    torch.manual_seed(cfg.seed)
    model = build(config["model"], source)
    reducer: Any = getattr(model, "reducer", None)
    wanted = getattr(model, "pretrained_cfg", None) or {}
    if reducer is not None:
        heed_rate(reducer)
    rates = list(reducer.keep_rate) if reducer is not None else []
    dense = set(rates) <= {1.0}
    about = dict(
        model=model_name(config, source),
        reducer=None if dense else reducer.name,
        keep_rate=rates,
        fusion=None if dense else getattr(reducer, "fusion", None),
        img_size=config["img_size"],
        num_classes=model.num_classes,
        mean=source.run.get("mean") or list(wanted.get("mean", MEAN)),
        std=source.run.get("std") or list(wanted.get("std", STD)),
        checkpoint=source.path and source.path.name,
        commit=results.git_commit(),
    )
    return model.eval().requires_grad_(False), about
