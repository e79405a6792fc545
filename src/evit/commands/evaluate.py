"""Evaluate a checkpoint with many reducers and keep rates in one pass; write evaluation.json."""

import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from evit import measure
from evit.commands import checkpoint
from evit.commands.checkpoint import Source
from evit.config import listed
from evit.measure.speed import keep_compiled
from evit.reducers import Reducer
from evit.report import evaluations, results
from evit.training.callbacks import progress
from evit.training.evaluator import Evaluator, setting_of
from evit.training.trainer import Signals, build_trainer, quiet, say


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate by a composed configuration; leave evaluation.json in Hydra's run folder."""
    quiet()
    folder = Path(HydraConfig.get().runtime.output_dir)
    if not cfg.checkpoint:
        raise ValueError("checkpoint=PATH is needed: a run's folder or checkpoint, or a .pth file")
    source = checkpoint.open_source(cfg.checkpoint)
    nodes = reducer_nodes(cfg)
    if nodes:  # of several, the model is built with the first
        cfg.reducer = nodes[0]
    cfg = checkpoint.complete(cfg, source)
    if cfg.max_val_images is None and "max_val_images" not in checkpoint.given():  # null: all
        cfg.max_val_images = (checkpoint.DEFAULTS | source.run)["max_val_images"]
    gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if bf16 and cfg.trainer.precision == "auto":
        cfg.trainer.precision = "bf16-true"
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    options = dict(max_epochs=1, enable_checkpointing=False)
    trainer = build_trainer(cfg.trainer, folder, [Signals(), *progress()], **options)
    batch_size = config["batch_size"] * trainer.world_size * trainer.accumulate_grad_batches
    data = checkpoint.validation(cfg, batch_size, max_val_images=config["max_val_images"])
    data.trainer = trainer
    checkpoint.require_classes(source, data)
    model = checkpoint.build(config["model"], source, num_classes=data.num_classes)
    data.normalize_for(model)
    if "mean" in source.run:
        data.mean, data.std = tuple(source.run["mean"]), tuple(source.run["std"])
    several: list[Any] = [OmegaConf.to_container(node) for node in nodes]
    chosen = choose(config, several or [config["reducer"]], model, source)
    evaluator = Evaluator(model, chosen, data.num_classes, config["seed"])
    costs = [cost(model, reducer) for reducer in chosen]
    limit = f"; at most {cfg.max_val_images} images (max_val_images=null: all)"
    text = f"Evaluating {len(chosen)} setting{'s' * (len(chosen) > 1)} on {data.name} "
    text += f"({data.num_classes} classes), read by {data.backend}" + limit * bool(
        cfg.max_val_images
    )
    if compiled := gpu if cfg.compile is None else cfg.compile:
        keep_compiled()
        evaluator.compile_parts(cfg.batch_size)
        text += "; compiled, which takes a while at first (compile=false)"
    say(text)
    for step in data.prepare_data, data.setup:  # what can be wrong with the data is said here
        rank_zero_only(step)()

    started = time.perf_counter()
    trainer.validate(evaluator, data, verbose=False)
    seconds = time.perf_counter() - started
    each = zip(evaluator.settings, evaluator.results, costs, strict=True)
    rows = [vars(setting) | found | cost for setting, found, cost in each]
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
        precision=str(trainer.precision) + ", compiled" * compiled,
        device=results.device_name(trainer.strategy.root_device),
        seconds=round(seconds, 3),
    )
    if trainer.is_global_zero:
        result |= results.provenance()
        folder.mkdir(parents=True, exist_ok=True)
        results.write_json(result, folder / "evaluation.json")
        evaluations.show(result, folder / "evaluation.json")
    return result


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
    """
    rates, budgets = config["keep_rates"], listed(config["gmacs"] or [])
    if rates is None:
        rates = [] if budgets else [config["keep_rate"]]
    if not isinstance(rates, list) or not rates + budgets:
        raise ValueError(f"keep_rates must be a list such as [1,0.7,0.5], got {rates!r}")
    if not hasattr(model, "reducer"):
        if not all(listed(rate) == [1] for rate in rates) or budgets:
            raise ValueError(
                f"{type(model).__name__} reduces no tokens: keep_rate=1, or take it with a reducer "
                f"by model=timm_vit model.model_name=NAME"
            )
        return [None]
    choices = {k: listed(config[k]) for k in ("selection", "fusion") if config[k] not in (None, [])}
    if not all(isinstance(value, bool) for value in choices.get("fusion", [])):
        raise ValueError(f"fusion must be true, false or [true,false], got {config['fusion']!r}")
    for node in nodes:
        if lacks := [k for k in choices if k in checkpoint.given() and k not in node]:
            name = node["_target_"].rpartition(".")[2]
            say(f"{name} has no {' and no '.join(lacks)}: that is left out.")
    targets = [(rate, None) for rate in rates] + [(1.0, budget) for budget in budgets]
    chosen: dict[Any, Any] = {}
    for (rate, budget), node in product(targets, nodes):
        own = {k: values for k, values in choices.items() if k in node}
        for values in product(*own.values()):
            wanted = node | dict(zip(own, values, strict=True), keep_rate=rate)
            reducer = checkpoint.attach(model, wanted, source)
            if budget:
                measure.match_macs(model, budget)
            chosen.setdefault(setting_of(reducer), reducer)
    return list(chosen.values())


def cost(model: Any, reducer: Reducer | None) -> dict[str, Any]:
    """Multiply-accumulates of one image: as the published tables count, and as computed here."""
    published = None
    if reducer is not None:
        model.reducer = reducer
        published = measure.count_macs(model)
    return dict(macs=published, macs_executed=measure.count_macs(model, executed=True))
