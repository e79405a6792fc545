"""Evaluate a checkpoint with many reducers and keep rates in one pass, or as a cascade."""

import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from evit import measure
from evit.commands import checkpoint
from evit.config import counted, listed
from evit.data.batch import normalize
from evit.files import telling
from evit.measure.speed import keep_compiled
from evit.models import Cascade
from evit.report import markdown, results, show_evaluation
from evit.training import Signals, build_trainer, quiet, say
from evit.training.callbacks import progress_bar
from evit.training.module import Evaluator, setting_of

EVERY = 10  # one batch in ten calibrates the threshold; it is not reported


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run an evaluation; write evaluation.json into Hydra's run folder."""
    quiet()
    if {"keep_rate", "keep_rates"} <= checkpoint.given():
        raise ValueError("keep_rate has no effect beside keep_rates: give one of them")
    if cfg.cascade:
        return run_cascade(cfg)
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


@telling(lambda: "evaluating")
@torch.no_grad()
def run_cascade(cfg: DictConfig) -> dict[str, Any]:
    """Choose the threshold for a budget of gmacs on some batches; measure on the others.

    For comparison, the fixed keep rate of the same cost alternates with it, batch by batch.
    """
    rates, budget = [float(rate) for rate in cfg.cascade], cfg.gmacs
    model, about, cfg, source = checkpoint.opened(cfg)
    data = checkpoint.validation(cfg, cfg.batch_size, cfg.max_val_images, ready=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    costs = []
    for rate in rates:
        model.set_keep_rate(rate)
        costs.append(measure.count_macs(model) / 1e9)
    if len(rates) != 2 or not isinstance(budget, int | float) or not costs[0] < budget < sum(costs):
        text = f"from {costs[0]:.4g} to {sum(costs):.4g}, got cascade={rates} gmacs={budget}"
        raise ValueError(f"a cascade needs two keep rates and one budget of gmacs, {text}")
    fixed = measure.match_macs(model, min(budget, costs[1]))
    cost = measure.count_macs(model) / 1e9
    cascade, seen = Cascade(model.to(device), rates, 0.0), list[Any]()
    for i, (pixels, labels, *_) in enumerate(data.val_dataloader()):
        images = normalize(pixels, about["mean"], about["std"]).to(device)
        if i % EVERY == 0:
            model.set_keep_rate(rates[0])
            seen.append(model(images).softmax(1).amax(1))
            share = (budget - costs[0]) / costs[1]
            cascade.thresholds = [torch.cat(seen).quantile(share).item()]
            if i == 0:
                cascade(images)  # warm
                cascade.images, rows = [0, 0], dict(cascade=[0, 0.0, 0], fixed=[0, 0.0, 0])
            continue
        for name in ("cascade", "fixed") if i % 2 else ("fixed", "cascade"):
            if name == "fixed":
                model.set_keep_rate(fixed)
            started = time.perf_counter()
            logits = cascade(images) if name == "cascade" else model(images)
            right = (logits.argmax(1).cpu() == labels).sum().item()
            for column, value in enumerate((right, time.perf_counter() - started, len(labels))):
                rows[name][column] += value
    if not rows["fixed"][2]:
        raise ValueError(f"one batch of {cfg.batch_size} holds all images: lower batch_size")
    macs = dict(cascade=cascade.macs(costs), fixed=cost)
    found = {
        name: dict(top1=100 * right / n, gmacs=macs[name], images_per_s=n / seconds, images=n)
        for name, (right, seconds, n) in rows.items()
    }
    result = dict(rates=rates, threshold=cascade.thresholds[0], fixed_rate=fixed, **found)
    titles = dict(cascade=f"{rates[0]:g}, unsure ones {rates[1]:g}", fixed=f"{fixed:.3g} for all")
    lines = [
        {"keep rate": titles[name], "top-1": f"{row['top1']:.2f}"}
        | {"GMACs": f"{row['gmacs']:.4g}", "images/s": f"{row['images_per_s']:.0f}"}
        for name, row in found.items()
    ]
    print(markdown(lines) + f"\nUnsure: below {cascade.thresholds[0]:.3f}.")
    folder = Path(HydraConfig.get().runtime.output_dir)
    results.write_json(result | dict(checkpoint=str(source.path)), folder / "cascade.json")
    return result
