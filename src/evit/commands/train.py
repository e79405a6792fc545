"""Train a model: prepare, fit, evaluate, and write result.json."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from evit import load_checkpoint, measure
from evit.commands.build import build_data, build_model, build_teacher, compile_all
from evit.config import plain
from evit.data import Images
from evit.recipe import Recipe
from evit.report import results, rows
from evit.tracking import JsonlLogger, Tracker, wandb_logger, wandb_mode
from evit.training import checkpoints
from evit.training.callbacks import InferenceSpeed, KeepRateSchedule, KeptPatches
from evit.training.ema import EMA
from evit.training.losses import make_objective
from evit.training.module import Classifier
from evit.training.nonfinite import NonFinite
from evit.training.progress import Throughput, progress
from evit.training.trainer import Signals, accumulate, build_trainer, quiet, say

GROUPS = ("reducer", "model", "data", "recipe", "experiment")


@dataclass
class Run:
    """What a run is made of."""

    folder: Path
    config: dict[str, Any]
    started: float
    trainer: L.Trainer
    data: Images
    module: Classifier
    throughput: Throughput
    inference: InferenceSpeed
    tracker: Tracker | None = None
    checkpoint: Path | None = None  # training goes on from it


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train by a composed configuration; leave result.json in Hydra's run folder and return it.

    A run that has finished there is shown, not repeated; an interrupted one goes on from its last
    checkpoint. cfg.overwrite starts anew.

    Raises:
        ValueError: the configuration cannot be served; nothing has been written.
    """
    quiet()
    folder, config = Path(HydraConfig.get().runtime.output_dir), plain(cfg)
    if not cfg.overwrite:
        results.check_config(folder, config)
        if before := results.finished(folder):
            say("This run has finished before: overwrite=true repeats it.")
            rank_zero_only(results.show)(before, folder)
            return before
    job = prepare(cfg, folder, config)
    try:
        fit(job)
        result = write(job, evaluate(job))
    except BaseException as error:
        if job.tracker:
            job.tracker.end(1)
        if isinstance(error, SystemExit) and error.code == 1:  # what Lightning makes of it
            raise KeyboardInterrupt from None
        raise
    if job.tracker:
        job.tracker.end()
    return result


def prepare(cfg: DictConfig, folder: Path, config: dict[str, Any]) -> Run:
    """Build all that a run needs, and write nothing before what can be wrong has been found."""
    started, throughput = time.monotonic(), Throughput(cfg.recipe.batch_size)
    first = checkpoints.given(cfg.resume, folder)
    last = None if cfg.overwrite else checkpoints.unfinished(folder)
    tempfile.TemporaryFile(dir=folder).close()  # is an OSError now, not after hours
    mode = wandb_mode(config["logger"]["mode"])
    recipe: Any = OmegaConf.to_object(cfg.recipe)
    recipe.check_start(cfg.checkpoint, cfg.pretrained)
    inference = InferenceSpeed()
    trainer = build_trainer(
        cfg.trainer,
        folder,
        callbacks(cfg, recipe, folder, throughput, inference),
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.clip_grad,
        check_val_every_n_epoch=recipe.eval_every,
    )
    accumulate(trainer, cfg.trainer, recipe)
    data = build_data(cfg, recipe)
    data.trainer = trainer
    module = build_module(cfg, recipe, data, config)
    for step in data.prepare_data, data.setup:  # what can be wrong with the data is said here
        rank_zero_only(step)()
    if first and not last:
        rank_zero_only(checkpoints.require_unfinished)(first, data, recipe.epochs)
    if last:
        say(f"Going on from {last}: overwrite=true starts anew.")
    else:
        rank_zero_only(results.start)(folder, config)
    steps = checkpoints.optimizer_steps(last) if last else None
    trainer.loggers = [JsonlLogger(folder / "metrics.jsonl", steps)]
    job = Run(folder, config, started, trainer, data, module, throughput, inference)
    job.checkpoint = last or first
    job.tracker = mirror(job, mode)
    return job


def mirror(job: Run, mode: str) -> Tracker | None:
    """Let the chosen logger mirror metrics.jsonl; return it if it is W&B."""
    options, loggers = job.config["logger"], job.trainer.loggers
    if target := options.get("_target_"):  # one of Lightning's own
        choice = HydraConfig.get().runtime.choices["logger"]
        kind = dict(_target_=target, save_dir=job.folder, name="", version=choice)
        loggers.append(instantiate(kind))
        return None
    options = options | dict(name=job.folder.name, mode=mode)
    if tracker := wandb_logger(job.folder, config=job.config, **options):
        loggers.append(tracker)
    return tracker


def fit(job: Run) -> None:
    """Train, from the beginning or from a checkpoint."""
    job.trainer.fit(job.module, job.data, ckpt_path=job.checkpoint, weights_only=True)


def evaluate(job: Run) -> dict[str, float]:
    """The metrics of the last evaluation, made now if the run was interrupted before it."""
    trainer = job.trainer
    if "val/top1" not in trainer.callback_metrics:
        trainer.loggers = []  # which have it already
        trainer.validate(
            job.module, job.data, ckpt_path=job.checkpoint, verbose=False, weights_only=True
        )
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def write(job: Run, metrics: dict[str, float]) -> dict[str, Any]:
    """Write result.json and show it."""
    trainer, data, config = job.trainer, job.data, job.config
    choices = HydraConfig.get().runtime.choices
    result: dict[str, Any] = dict(
        top1=metrics["val/top1"],
        top5=metrics["val/top5"],
        loss=metrics["val/loss"],
        train_images_per_s=job.throughput.images_per_s,
        throughput=job.inference.images_per_s,
        model=facts(job.module.model, data.img_size),
        data=dict(name=data.name, num_classes=data.num_classes),
        choices={group: choices[group] for group in GROUPS},
        config=config,
        started_from=rows.started_from(config["checkpoint"]),
        processes=trainer.world_size,
        precision=str(trainer.precision),
        device=results.device_name(trainer.strategy.root_device),
        seconds=round(time.monotonic() - job.started, 1),
        wandb_id=job.tracker.version if job.tracker else None,
    )
    if trainer.is_global_zero:
        result = results.finish(result, job.folder)
        if job.tracker:
            job.tracker.log_summary(results.summary(result))
        results.show(result, job.folder)
    return result


def callbacks(
    cfg: DictConfig, recipe: Recipe, folder: Path, throughput: Throughput, inference: L.Callback
) -> list[L.Callback]:
    """What happens beside training, in this order."""
    inside, every = folder / "checkpoints", cfg.checkpoint_every_n_steps
    multiple = recipe.token_multiple or (8 if cfg.compile else 1)
    reducing = [
        KeepRateSchedule(recipe.shrink_start_epoch, recipe.shrink_epochs, multiple),
        KeptPatches(folder / "kept_patches.png"),
    ]
    return [
        NonFinite(),
        throughput,
        *progress(throughput),
        Signals(),
        checkpoints.LastCheckpoint(inside, every, cfg.keep_checkpoint_every_n_epochs),
        checkpoints.BestCheckpoint(inside, recipe.full_rate_epoch),
        *([EMA(recipe.ema_decay, recipe.ema_evaluated)] if recipe.ema_decay is not None else []),
        *(reducing if "reducer" in cfg.model else []),
        inference,
    ]


def build_module(
    cfg: DictConfig, recipe: Recipe, data: Images, config: dict[str, Any]
) -> Classifier:
    """The model with its weights, its objective, and what its checkpoints say of it."""
    model = build_model(cfg, recipe, data.num_classes)
    data.normalize_for(model)
    if cfg.checkpoint:
        load_checkpoint(model, cfg.checkpoint, new_head=True, new_parts=True)
    teacher = build_teacher(cfg, model)
    announce(cfg, data, model, teacher is not None)
    sizes = (data.num_classes, data.local_batch_size)
    objective = make_objective(model, recipe, *sizes, data.has_label_maps, teacher)
    names = ("model", "keep_rate", "fusion", "img_size", "crop_pct")
    knobs: dict[str, Any] = {name: config[name] for name in names} | dict(
        data=data.name, classes=list(data.classes), mean=list(data.mean), std=list(data.std)
    )
    module = Classifier(model, recipe, data.num_classes, objective, cfg.seed, knobs)
    if cfg.compile:
        compile_all(model, objective)
    return module


def announce(cfg: DictConfig, data: Images, model: Any, teacher: bool) -> None:
    """Say what will be trained on, and what is left out or not used."""
    recipe, choices = cfg.recipe, HydraConfig.get().runtime.choices
    name = choices["model"]
    if set(getattr(model, "keep_rate", [1])) == {1} and cfg.keep_rate != 1:
        say(f"{name} keeps every token: keep_rate and fusion are not used.")
    own = hasattr(model, "reducer") and model.reducer.masked
    if own:
        say("DynamicViT drops, at a constant rate: fusion and recipe.shrink_epochs are not used.")
        if not teacher:
            say("Without a teacher of these classes there is no distillation: checkpoint=PATH.")
    elif hasattr(model, "heads") and not data.has_label_maps:
        say("Without label maps LV-ViT is a plain classifier, no MixToken: data.label_maps=DIR.")
    if data.has_label_maps and (own or not hasattr(model, "heads")):
        say(f"{name} has no token labelling: the label maps are not used.")
    text = f"Training on {data.name} ({data.num_classes} classes, scale={choices['scale']}): "
    text += f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)}, batch size {recipe.batch_size}"
    if recipe.max_train_images or recipe.max_val_images:
        text += f"; the recipe takes at most {recipe.max_train_images or 'all'} training and "
        text += f"{recipe.max_val_images or 'all'} validation images (recipe.max_train_images, "
        text += "recipe.max_val_images)"
    say(text)


def facts(model: Any, img_size: int) -> dict[str, Any]:
    """What the model is and costs, for the tables."""
    result: dict[str, Any] = dict(
        img_size=img_size,
        params=measure.count_params(model),
        macs_executed=measure.count_macs(model, executed=True),
    )
    if hasattr(model, "reducer"):
        result |= dict(
            reducer=model.reducer.name,
            keep_rate=list(model.keep_rate),
            drop_loc=list(model.drop_loc),
            fusion=model.fusion,
            macs=measure.count_macs(model),
        )
    return result
