"""Evaluate a checkpoint with many reducers and keep rates in one pass; write evaluation.json."""

import time
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from evit import measure
from evit.commands import checkpoint
from evit.commands.checkpoint import Source
from evit.config import listed
from evit.data import Images
from evit.recipe import Recipe
from evit.reducers import Reducer
from evit.reducers.evit import SELECTIONS
from evit.report import evaluations, results
from evit.training.evaluator import Evaluator, setting_of
from evit.training.progress import progress
from evit.training.trainer import Signals, build_trainer, quiet, say


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate by a composed configuration; leave evaluation.json in Hydra's run folder.

    Raises:
        ValueError: the configuration cannot be served; nothing has been written.
    """
    quiet()
    folder = Path(HydraConfig.get().runtime.output_dir)
    if not cfg.checkpoint:
        raise ValueError("checkpoint=PATH is needed: a run's folder or checkpoint, or a .pth file")
    source = checkpoint.open_source(cfg.checkpoint)
    nodes = reducer_nodes(cfg)
    config = complete(cfg, nodes, source)
    options = dict(max_epochs=1, enable_checkpointing=False)
    trainer = build_trainer(cfg.trainer, folder, [Signals(), *progress()], **options)
    data = build_data(config, source, trainer)
    model = checkpoint.build(config["model"], source, num_classes=data.num_classes)
    data.normalize_for(model)
    several: list[Any] = [OmegaConf.to_container(node) for node in nodes]
    chosen = choose(config, several or [config["reducer"]], model, source)
    evaluator = Evaluator(model, chosen, data.num_classes, config["seed"])
    costs = [cost(model, reducer) for reducer in chosen]
    announce(data, config, len(chosen))
    for step in data.prepare_data, data.setup:  # what can be wrong with the data is said here
        rank_zero_only(step)()

    started = time.perf_counter()
    trainer.validate(evaluator, data, verbose=False)
    seconds = time.perf_counter() - started
    rows = [
        vars(setting) | found | cost
        for setting, found, cost in zip(evaluator.settings, evaluator.results, costs, strict=True)
    ]
    result: dict[str, Any] = dict(
        checkpoint=str(source.path),
        checkpoint_sha256=results.sha256(Path(source.path or "")),
        trained_keep_rate=results.trained_keep_rate(source.run),
        settings=rows,
        images=rows[0]["images"],
        model=dict(
            name=checkpoint.model_name(config, source),
            img_size=data.img_size,
            params=measure.count_params(model),
            drop_loc=list(getattr(model, "drop_loc", [])),
        ),
        data=dict(name=data.name, num_classes=data.num_classes, backend=data.backend),
        config=config,
        processes=trainer.world_size,
        precision=str(trainer.precision),
        device=results.device_name(trainer.strategy.root_device),
        seconds=round(seconds, 3),
    )
    if trainer.is_global_zero:
        result |= results.provenance()
        folder.mkdir(parents=True, exist_ok=True)
        results.write_json(result, folder / "evaluation.json")
        evaluations.show(result, folder / "evaluation.json")
    return result


def complete(cfg: DictConfig, nodes: list[DictConfig], source: Source) -> dict[str, Any]:
    """The configuration as plain values, with what was not given from the run, or by default.

    Raises:
        ValueError: no model is given, or a knob is out of range.
    """
    if nodes:  # of several, the model is built with the first
        cfg.reducer = nodes[0]
    cfg = checkpoint.complete(cfg, source)
    checkpoint.complete_data(cfg, source)
    checkpoint.complete_crop(cfg, source)
    if cfg.max_val_images is None and "max_val_images" not in checkpoint.given():  # null: all
        cfg.max_val_images = (checkpoint.DEFAULTS | source.run)["max_val_images"]
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for knob in ("batch_size", "max_val_images"):
        if config[knob] is not None and config[knob] < 1:
            raise ValueError(f"{knob} must be at least 1, got {config[knob]}")
    return config


def build_data(config: dict[str, Any], source: Source, trainer: L.Trainer) -> Images:
    """The data module; nothing is written yet.

    Raises:
        ValueError: the checkpoint has another number of classes.
    """
    recipe = Recipe(
        epochs=1,
        lr=1,
        batch_size=config["batch_size"] * trainer.world_size * trainer.accumulate_grad_batches,
        max_val_images=config["max_val_images"],
        crop_pct=config["crop_pct"],
    )
    data = instantiate(config["data"], recipe=recipe, splits=["val"], _convert_="object")
    data.trainer = trainer
    head = source.weights.get("head.weight")
    if head is not None and len(head) != data.num_classes:
        raise ValueError(
            f"the checkpoint has {len(head)} classes and {data.name} has {data.num_classes}: "
            f"give the data that it was trained on, data.root=DIR"
        )
    return data


def reducer_nodes(cfg: DictConfig) -> list[Any]:
    """The reducers of the command line, each as it stands in conf/reducer: reducer=[evit,merge]."""
    given, nodes, names = checkpoint.given(), [], []
    for override in HydraConfig.get().overrides.task:
        if override.startswith("reducer=["):
            names = yaml.safe_load(override.partition("=")[2])
    for name in names:
        node = compose(f"reducer/{name}").reducer
        changed = {k: cfg.reducer[k] for k in node if f"reducer.{k}" in given}
        nodes.append(OmegaConf.merge(node, changed))
    return nodes


def choose(
    config: dict[str, Any], nodes: list[dict[str, Any]], model: Any, source: Source
) -> list[Any]:
    """Every reducer at every keep rate, with every fusion and selection that it has, each once.

    Returns: reducers attached to the model; [None] for a model that takes none.

    Raises:
        ValueError: a value is out of range, or this model has no such setting.
    """
    rates, choices = choices_of(config)
    if not hasattr(model, "reducer"):
        if not all(listed(rate) == [1] for rate in rates) or config["gmacs"]:
            raise ValueError(
                f"{type(model).__name__} reduces no tokens: keep_rate=1, or take it with a reducer "
                f"by model=timm_vit model.model_name=NAME"
            )
        return [None]
    given = checkpoint.given()
    for node in nodes:
        if lacks := [k for k in choices if k in given and k not in node]:
            name = node["_target_"].rpartition(".")[2]
            say(f"{name} has no {' and no '.join(lacks)}: that is left out.")
    targets = [(rate, None) for rate in rates] + [(1.0, budget) for budget in config["gmacs"]]
    chosen: dict[Any, Any] = {}
    for (rate, budget), node in product(targets, nodes):
        own = {k: values for k, values in choices.items() if k in node and values != [None]}
        for values in product(*own.values()):
            wanted = node | dict(zip(own, values, strict=True), keep_rate=rate)
            reducer = checkpoint.attach(model, wanted, source)
            checkpoint.heed_rate(reducer)
            if budget:
                measure.match_macs(model, budget)
            chosen.setdefault(setting_of(reducer), reducer)
    return list(chosen.values())


def choices_of(config: dict[str, Any]) -> tuple[list[Any], dict[str, list[Any]]]:
    """The keep rates; and selections and fusions, as lists.

    Raises:
        ValueError: there is none, or one that is out of range.
    """
    rates = config["keep_rates"]
    if rates is None:
        rates = [] if config["gmacs"] else [config["keep_rate"]]
    config["gmacs"] = listed(config["gmacs"] or [])
    if not isinstance(rates, list) or not rates + config["gmacs"]:
        raise ValueError(f"keep_rates must be a list such as [1,0.7,0.5], got {rates!r}")
    choices = {knob: listed(config[knob]) for knob in ("selection", "fusion")}
    if not choices["fusion"] or not all(isinstance(value, bool) for value in choices["fusion"]):
        raise ValueError(f"fusion must be true, false or [true,false], got {config['fusion']!r}")
    if not choices["selection"] or not {*choices["selection"]} <= {None, *SELECTIONS}:
        raise ValueError(
            f"selection, which tokens are kept, must be of {', '.join(SELECTIONS)}, "
            f"got {config['selection']!r}"
        )
    return rates, choices


def announce(data: Images, config: dict[str, Any], settings: int) -> None:
    """Say what is evaluated on, and how much of it."""
    text = f"Evaluating {settings} setting{'s' * (settings > 1)} on {data.name} "
    text += f"({data.num_classes} classes), read by {data.backend}"
    if limit := config["max_val_images"]:
        text += f"; at most {limit} validation images (max_val_images=null takes all)"
    say(text)


def cost(model: Any, reducer: Reducer | None) -> dict[str, Any]:
    """Multiply-accumulates of one image: as the published tables count, and as computed here."""
    published = None
    if reducer is not None:
        model.reducer = reducer
        published = measure.count_macs(model)
    return dict(macs=published, macs_executed=measure.count_macs(model, executed=True))
