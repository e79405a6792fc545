"""Evaluate a checkpoint with many reducers and keep rates in one pass; write evaluation.json."""

import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from evit import measure
from evit.commands import cascade, checkpoint
from evit.config import counted, listed
from evit.files import telling
from evit.measure.speed import keep_compiled
from evit.report import results, show_evaluation
from evit.training import Signals, build_trainer, quiet, say
from evit.training.callbacks import progress_bar
from evit.training.module import Evaluator, setting_of


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run an evaluation; write evaluation.json into Hydra's run folder."""
    quiet()
    if {"keep_rate", "keep_rates"} <= checkpoint.given():
        raise ValueError("keep_rate has no effect beside keep_rates: give one of them")
    if cfg.cascade:
        return cascade.run(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    nodes = list(checkpoint.reducer_nodes(cfg).values())
    if nodes:  # the model is built with the first
        cfg.reducer = nodes[0]
    model, about, cfg, source = checkpoint.opened(cfg)
    gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    if gpu and cfg.trainer.precision == "auto" and torch.cuda.is_bf16_supported(False):
        cfg.trainer.precision = "bf16-true"
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    options = dict(max_epochs=1, enable_checkpointing=False)
    bar = progress_bar()
    trainer = build_trainer(cfg.trainer, folder, [Signals(), *bar], **options)
    batch_size = cfg.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    data = checkpoint.validation(cfg, batch_size, cfg.max_val_images)
    data.trainer = trainer
    data.mean, data.std = tuple(about["mean"]), tuple(about["std"])
    ours, theirs = list(data.classes), about["classes"] or [*range(about["num_classes"])]
    if len(ours) != len(theirs) or about["classes"] and ours != theirs:
        text = f"the checkpoint has {len(theirs)} classes, {theirs[0]} to {theirs[-1]}, and "
        text += f"{data.name} has {len(ours)}, {ours[0]} to {ours[-1]}"
        raise ValueError(f"{text}: give the data that it was trained on, data.root=DIR")
    chosen = choose(config, nodes or [config["reducer"]], model, source)
    costs = [cost(model, reducer) for reducer in chosen]
    evaluator = Evaluator(model, chosen, data.num_classes, cfg.seed)
    text = f"Evaluating {counted(len(chosen), 'setting')} on {data.name} "
    text += f"({data.num_classes} classes), read by {data.backend}"
    if cfg.max_val_images:
        text += f"; at most {cfg.max_val_images} images (max_val_images=null: all)"
    if compiled := gpu if cfg.compile is None else cfg.compile:
        keep_compiled()
        evaluator.compile_parts(cfg.batch_size)
        text += "; compiled, which takes a while at first (compile=false)"
    say(text)
    for step in data.prepare_data, data.setup:  # raises the errors of the data here
        rank_zero_only(step)()

    started = time.perf_counter()
    silent = bar or not trainer.is_global_zero
    with telling(lambda: "" if silent else evaluator.at):
        trainer.validate(evaluator, data, verbose=False)
    each = zip(evaluator.settings, evaluator.results, costs, strict=True)
    rows = [setting._asdict() | found | cost for setting, found, cost in each]
    result: dict[str, Any] = dict(
        checkpoint=str(source.path),
        checkpoint_sha256=results.sha256(Path(source.path or "")),
        trained_keep_rate=results.trained_keep_rate(source.run),
        settings=rows,
        images=rows[0]["images"],
        model=dict(
            name=about["model"],
            img_size=data.img_size,
            params=measure.count_params(model),
            drop_loc=list(getattr(model, "drop_loc", [])),
        ),
        data=dict(name=data.name, num_classes=data.num_classes, backend=data.backend),
        config=config,
        processes=trainer.world_size,
        precision=str(trainer.precision) + ", compiled" * compiled,
        device=results.device_name(trainer.strategy.root_device),
        seconds=round(time.perf_counter() - started, 3),
    )
    if trainer.is_global_zero:
        result |= results.provenance()
        results.write_json(result, folder / "evaluation.json")
        show_evaluation(result, folder / "evaluation.json")
    return result


def choose(config: dict[str, Any], nodes: list[Any], model: Any, source: Any) -> list[Any]:
    """Make all combinations of reducer, keep rate, fusion and selection, each once.

    Returns: reducers attached to the model; [None] for a model without reducers.
    """
    rates, budgets = config["keep_rates"], listed(config["gmacs"] or [])
    rates = listed(rates or ([] if budgets else [config["keep_rate"]]))
    if not hasattr(model, "reducer"):
        if budgets or not all(listed(rate) == [1] for rate in rates):
            name = type(model).__name__
            raise ValueError(f"{name} reduces no tokens: keep_rate=1, or {checkpoint.REDUCED}")
        return [None]
    choices = {k: listed(config[k]) for k in ("selection", "fusion") if config[k] not in (None, [])}
    if not all(isinstance(value, bool) for value in choices.get("fusion", [])):
        raise ValueError(f"fusion must be true, false or [true,false], got {config['fusion']!r}")
    for node in nodes:
        if lacks := [k for k in choices if k in checkpoint.given() and k not in node]:
            name = node["_target_"].rpartition(".")[2]
            say(f"{name} has no {' and no '.join(lacks)}: ignored.")
    chosen: dict[Any, Any] = {}
    targets = [(rate, None) for rate in rates] + [(1.0, budget) for budget in budgets]
    for (rate, budget), node in product(targets, nodes):
        own = {k: values for k, values in choices.items() if k in node}
        for values in product(*own.values()):
            wanted = node | dict(zip(own, values, strict=True), keep_rate=rate)
            reducer = checkpoint.attach(model, wanted, source)
            if budget:
                measure.match_macs(model, budget)
            chosen.setdefault(setting_of(reducer), reducer)
    return list(chosen.values())


def cost(model: Any, reducer: Any) -> dict[str, Any]:
    """Multiply-accumulates per image: by the published count, and as executed here."""
    if reducer is not None:
        model.reducer = reducer
    published = None if reducer is None else measure.count_macs(model)
    return dict(macs=published, macs_executed=measure.count_macs(model, executed=True))
