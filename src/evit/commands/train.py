"""Train a model: prepare, fit, evaluate, and write result.json."""

import tempfile
import time
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
from evit.report import results
from evit.tracking import JsonlLogger, Tracker, wandb_logger, wandb_mode
from evit.training import checkpoints
from evit.training.callbacks import InferenceSpeed, KeepRateSchedule, KeptPatches
from evit.training.ema import EMA
from evit.training.losses import make_objective
from evit.training.module import Classifier
from evit.training.nonfinite import NonFinite
from evit.training.progress import Throughput, progress
from evit.training.trainer import Signals, build_trainer, quiet, say

GROUPS = ("reducer", "model", "data", "recipe", "experiment")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train by a composed configuration; leave result.json in Hydra's run folder and return it.

    A run that has finished there is shown, not repeated; an interrupted one goes on from its last
    checkpoint. cfg.overwrite starts anew. What can be wrong is found before anything is written.
    """
    quiet()
    folder, started = Path(HydraConfig.get().runtime.output_dir), time.monotonic()
    config = plain(cfg)
    if not cfg.overwrite:
        results.check_config(folder, config)
        if before := results.finished(folder):
            say("This run has finished before: overwrite=true repeats it.")
            rank_zero_only(results.show)(before, folder)
            return before
    first = checkpoints.given(cfg.resume, folder)
    last = None if cfg.overwrite else checkpoints.unfinished(folder)
    tempfile.TemporaryFile(dir=folder).close()  # is an OSError now, not after hours
    mode = wandb_mode(config["logger"]["mode"])
    recipe: Any = OmegaConf.to_object(cfg.recipe)
    if recipe.finetune and not cfg.checkpoint and not cfg.pretrained:
        raise ValueError(
            "this recipe fine-tunes a trained model: give its weights by checkpoint=PATH, or "
            "pretrained=true for timm's; recipe.finetune=false starts from random ones"
        )
    throughput, inference = Throughput(recipe.batch_size), InferenceSpeed()
    trainer = build_trainer(
        cfg.trainer,
        folder,
        [*callbacks(cfg, recipe, folder, throughput), inference],
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.clip_grad,
        check_val_every_n_epoch=recipe.eval_every,
    )
    if str(trainer.precision).endswith("-true") and trainer.precision != "32-true":
        raise ValueError("trainer.precision must be auto, 32-true, bf16-mixed or 16-mixed")
    if cfg.trainer.accumulate_grad_batches is None:
        trainer.accumulate_grad_batches = recipe.accumulation(trainer.world_size)
    data = build_data(cfg, recipe)
    data.trainer = trainer
    module = build_module(cfg, recipe, data, config)
    for step in data.prepare_data, data.setup:  # what can be wrong with the data is said here
        rank_zero_only(step)()
    if last:
        say(f"Going on from {last}: overwrite=true starts anew.")
    else:
        if first:
            rank_zero_only(checkpoints.require_unfinished)(first, data, recipe.epochs)
        rank_zero_only(results.start)(folder, config)
    steps = checkpoints.optimizer_steps(last) if last else None
    trainer.loggers = [JsonlLogger(folder / "metrics.jsonl", steps)]
    tracker = mirror(trainer, folder, config, mode)
    try:
        metrics = fit(trainer, module, data, last or first)
        result: dict[str, Any] = dict(
            top1=metrics["val/top1"],
            top5=metrics["val/top5"],
            loss=metrics["val/loss"],
            train_images_per_s=throughput.images_per_s,
            throughput=inference.images_per_s,
            throughput_mode=inference.mode,
            model=facts(module.model, data.img_size),
            data=dict(name=data.name, num_classes=data.num_classes),
            choices={group: HydraConfig.get().runtime.choices[group] for group in GROUPS},
            config=config,
            started_from=results.started_from(config["checkpoint"] or first),
            processes=trainer.world_size,
            precision=str(trainer.precision),
            device=results.device_name(trainer.strategy.root_device),
            seconds=round(time.monotonic() - started, 1),
            wandb_id=tracker.version if tracker else None,
        )
        if trainer.is_global_zero:
            result = results.finish(result, folder)
            if tracker:
                tracker.log_summary(results.summary(result))
            results.show(result, folder)
    except BaseException as error:
        if tracker:
            tracker.end(1)
        if isinstance(error, SystemExit) and error.code == 1:  # what Lightning makes of it
            raise KeyboardInterrupt from None
        raise
    if tracker:
        tracker.end()
    return result


def mirror(trainer: L.Trainer, folder: Path, config: dict[str, Any], mode: str) -> Tracker | None:
    """Let the chosen logger mirror metrics.jsonl; return it if it is W&B."""
    options = config["logger"]
    if target := options.get("_target_"):  # one of Lightning's own
        choice = HydraConfig.get().runtime.choices["logger"]
        kind = dict(_target_=target, save_dir=folder, name="", version=choice)
        trainer.loggers.append(instantiate(kind))
        return None
    options = options | dict(name=folder.name, mode=mode)
    if tracker := wandb_logger(folder, config=config, **options):
        trainer.loggers.append(tracker)
    return tracker


def fit(
    trainer: L.Trainer, module: Classifier, data: Images, checkpoint: Path | None
) -> dict[str, float]:
    """Train, from the beginning or from a checkpoint; return the metrics of the last evaluation."""
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except (RuntimeError, KeyError) as error:
        if checkpoint and trainer.global_step == 0 and "load" in str(error):
            text = (
                f"{checkpoint} is of another model or recipe: {str(error).splitlines()[-1].strip()}"
            )
            raise ValueError(text) from error
        raise
    if "val/top1" not in trainer.callback_metrics:  # it was interrupted before that
        trainer.loggers = []  # which have it already
        trainer.validate(module, data, ckpt_path=checkpoint, verbose=False, weights_only=True)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def callbacks(
    cfg: DictConfig, recipe: Recipe, folder: Path, throughput: Throughput
) -> list[L.Callback]:
    """What happens beside training, in this order."""
    inside, every = folder / "checkpoints", cfg.checkpoint_every_n_steps
    found: list[L.Callback] = [
        NonFinite(),
        throughput,
        *progress(throughput),
        Signals(),
        checkpoints.LastCheckpoint(inside, every, cfg.keep_checkpoint_every_n_epochs),
        checkpoints.BestCheckpoint(inside, recipe.full_rate_epoch),
    ]
    if recipe.ema_decay is not None:
        found.append(EMA(recipe.ema_decay, recipe.ema_evaluated))
    if "reducer" in cfg.model:
        multiple = recipe.token_multiple or (8 if cfg.compile else 1)
        shrink = (recipe.shrink_start_epoch, recipe.shrink_epochs)
        found += [KeepRateSchedule(*shrink, multiple), KeptPatches(folder / "kept_patches.png")]
    return found


def build_module(
    cfg: DictConfig, recipe: Recipe, data: Images, config: dict[str, Any]
) -> Classifier:
    """The model with its weights, its objective, and what its checkpoints say of it."""
    if cfg.compile not in (True, False, "reduce-overhead"):
        raise ValueError(f"compile must be true, false or reduce-overhead, got {cfg.compile!r}")
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
        say("Compiling in the first steps: minutes at first, then from the cache.")
        compile_all(model, objective, cfg.compile)
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
    for knob in ("max_train_images", "max_val_images"):
        text += f", recipe.{knob}={recipe[knob]}" if recipe[knob] else ""
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
