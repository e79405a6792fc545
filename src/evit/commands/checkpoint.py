"""Open a model with its weights and the knobs of its run, for every command."""

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import yaml
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from evit import load_checkpoint
from evit.commands.plan import build
from evit.config import OUTPUTS, Recipe, folder_name, listed, overridden
from evit.data.batch import MEAN, STD
from evit.models.weights import fit_state_dict, read_file, read_state_dict
from evit.reducers import REDUCERS
from evit.report import rate, results

# Defaults for checkpoints that do not come from a run of ours.
DEFAULTS = dict(keep_rate=0.7, fusion=True, img_size=224, crop_pct=0.875, max_val_images=None)
WAYS = dict(checkpoint="PATH", pretrained="true (timm's download)", random="true (to try out)")
# A checkpoint, and knobs and model of its run (a name in conf/model, or timm's); empty without one.
Source = namedtuple("Source", "path weights run model", defaults=(None, {}, {}, None))


def given() -> set[str]:
    return overridden(HydraConfig.get().overrides.task)


def open_source(checkpoint: str | None) -> Source:
    """Read a checkpoint file, or the best one in a run's folder, with its knobs."""
    if not checkpoint:
        return Source()
    path = Path(checkpoint).expanduser()
    path = path / "checkpoints/best.ckpt" if path.is_dir() else path
    content = read_file(path)
    inside = content.get("evit") if isinstance(content, dict) else None
    run = results.harmless(json.dumps(inside or {})) | results.run_config(path)
    finished = results.finished(results.run_folder(path) or path)
    name = finished["choices"]["model"] if finished else run.get("model", {}).get("model_name")
    weights = read_state_dict(content.get("state_dict", {}) if inside else content)
    return Source(path, weights, run, name)


def reducer_nodes(cfg: DictConfig) -> dict[str, Any]:
    """Configurations of reducer=NAME or reducer=[evit,merge], as in conf/reducer, by name."""
    nodes: dict[str, Any] = {}
    for override in HydraConfig.get().overrides.task:
        if override.startswith("reducer="):
            for name in listed(yaml.safe_load(override.partition("=")[2])):
                node = compose(f"reducer/{name}").reducer
                changed = {k: cfg.reducer[k] for k in node if f"reducer.{k}" in given()}
                nodes[name] = OmegaConf.to_container(OmegaConf.merge(node, changed))
    return nodes


def complete(cfg: DictConfig, source: Source) -> DictConfig:
    """Fill in the model, reducer, data and null knobs, from the run or by default."""
    cfg, names, run = cfg.copy(), given(), source.run

    def merged(group: str, own: dict[str, Any]) -> Any:
        roots = {k: f"${{{k}}}" for k in ("keep_rate", "fusion", "img_size") if k in own}
        changed = {k: cfg[group][k] for k in cfg[group] if f"{group}.{k}" in names}
        return OmegaConf.merge(own, roots, changed)

    if "_target_" not in cfg.model:
        if not run:
            why = f": {source.path} does not name its model" if source.path else ""
            raise ValueError(f"model=NAME is needed, as in model=evit_deit{why}")
        cfg.model = merged("model", run["model"])
        if run["model"].get("reducer") and "reducer" not in names:
            cfg.reducer = merged("reducer", run["model"]["reducer"])
            run = run | run["model"]["reducer"]
    dense = cfg.model.get("reducer") is None and "reducer" not in names
    knobs = DEFAULTS | run | (dict(keep_rate=1.0) if dense else {})
    knobs["img_size"] = cfg.model.get("img_size") or knobs["img_size"]
    for knob in cfg.keys() & DEFAULTS.keys() - ({"max_val_images"} & names):  # null: all of them
        cfg[knob] = knobs[knob] if cfg[knob] is None else cfg[knob]
    if not 0.01 <= cfg.get("crop_pct", 1) <= 1:
        raise ValueError(f"crop_pct must be from 0.01 to 1, got {cfg.crop_pct}")
    wanted = dict(reducer="${reducer}", img_size="${img_size}", pretrained=cfg.get("pretrained"))
    for knob in wanted.keys() & cfg.model.keys():
        cfg.model[knob] = wanted[knob] or False
    own = run.get("data") if "data" not in names else None  # a name, away from the run's folder
    if "data" in cfg and isinstance(own, dict) and ("root" in own or "data.root" not in names):
        cfg.data = merged("data", own)
    elif "data" in cfg and "data.backend" not in names:
        root = Path(cfg.data.get("root") or "").expanduser()
        cfg.data.backend = "ffcv" if (root / "val.beton").is_file() else "imagefolder"
    return cfg


def validation(cfg: DictConfig, batch_size: int, most: int | None, ready: bool = False) -> Any:
    """The data module of `most` validation images; `ready`: set up, else nothing is read yet."""
    recipe = Recipe(1, batch_size, lr=1, max_val_images=most, crop_pct=cfg.crop_pct)
    data = instantiate(cfg.data, recipe=recipe, splits=["val"], _convert_="object")
    if ready:
        data.prepare_data()
        data.setup()
    return data


def load(model: Any, source: Source) -> None:
    """Load the weights that there are, without those of a reducer that the model does not have."""
    reducer = model.reducer
    if (reducer.own or reducer.given) and given() & {"keep_rate", "keep_rates"}:
        way = f"leave keep_rate out, or choose the reducer anew, reducer={reducer.name}"
        raise ValueError(f"reducer {reducer.name} has another schedule than keep_rate: {way}")
    if not source.weights:
        return
    weights = fit_state_dict(source.weights, model)
    if not reducer.state_dict():
        others = ("reducer.", *REDUCERS["dynamicvit"].published_names)
        weights = {k: w for k, w in weights.items() if not k.startswith(others)}
    elif not any(k.startswith("reducer.") for k in weights):
        why = f"and {source.path} has no weights of it: take another"
        raise ValueError(f"reducer {reducer.name} has to be trained, {why}")
    try:
        load_checkpoint(model, weights)
    except ValueError as error:
        had = f"; the run had model={source.model}" if source.model else ""
        raise ValueError(f"{error}{had}") from error


def opened(cfg: DictConfig) -> tuple[Any, dict[str, Any], DictConfig, Source]:
    """Open a command's model: the frozen model, facts about it, the completed configuration."""
    if sum(bool(cfg.get(name)) for name in WAYS) != 1:
        ways = ", ".join(f"{name}={way}" for name, way in WAYS.items() if name in cfg)
        raise ValueError(f"give the weights, one of {ways}")
    source = open_source(cfg.checkpoint)
    cfg = complete(cfg, source)
    config: Any = OmegaConf.to_container(cfg.model, resolve=True, throw_on_missing=True)
    if (head := source.weights.get("head.weight")) is not None:
        config["num_classes"] = len(head)
    model = build(config, cfg.seed, cfg.img_size)
    load(model, source)
    wanted = (getattr(model, "pretrained_cfg", None) or dict(mean=MEAN, std=STD)) | source.run
    rates, choice = list(model.keep_rate), HydraConfig.get().runtime.choices["model"]
    reducer = None if set(rates) == {1.0} else model.reducer
    about = dict(model=choice or source.model or config.get("model_name", "model"))  # in conf/model
    about |= dict(reducer=reducer and reducer.name, keep_rate=rates, img_size=cfg.img_size)
    about |= dict(fusion=getattr(reducer, "fusion", None), num_classes=model.num_classes)
    about |= dict(mean=list(wanted["mean"]), std=list(wanted["std"]))
    about |= dict(classes=source.run.get("classes"))
    about |= dict(checkpoint=source.path and source.path.name, commit=results.git_commit())
    return model.eval().requires_grad_(False), about, cfg, source


def target_file(cfg: DictConfig, about: dict[str, Any], folder: str, suffix: str) -> Path:
    """target=PATH, or FOLDER/MODEL-REDUCER-KEEPRATE-SIZE-HASH, of the weights and all knobs."""
    parts = [about["model"], about["reducer"], rate(about), about["img_size"]]
    parts.append(results.digest(OmegaConf.to_yaml(cfg)))
    name = folder_name("-".join(str(part) for part in parts if part is not None))
    return Path(cfg.target or OUTPUTS / folder / f"{name}{suffix}")
