"""One run: build, fit, evaluate, write result.json."""

import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from evit import load_checkpoint, measure
from evit.compiling import private_cache
from evit.config import HOW
from evit.data import Images
from evit.models import DynamicViT, EViT, LVViT
from evit.models.weights import read_state_dict
from evit.report import results, tables
from evit.tracking import JsonlLogger, start_service, wandb_logger, wandb_mode
from evit.training import checkpoints, peers
from evit.training.callbacks import InferenceSpeed, KeepRateSchedule, KeptPatches, Signals
from evit.training.ema import EMA
from evit.training.module import Classifier, mix_seed
from evit.training.nonfinite import NonFinite
from evit.training.objectives import Classification, dense_teacher, make_objective
from evit.training.progress import Throughput, progress
from evit.recipe import Recipe
from evit.training.trainer import accumulate, build_trainer, quiet, say

GROUPS = ("model", "data", "recipe", "experiment")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train by a composed configuration; leave result.json in Hydra's run folder and return it.

    A run that has finished there before is shown, not repeated; one that was interrupted goes on
    from its last checkpoint. cfg.overwrite starts anew.

    Raises:
        ValueError: the configuration cannot be served; nothing has been written.
    """
    quiet()
    started = time.monotonic()
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    folder = Path(HydraConfig.get().runtime.output_dir)
    overwrite, resume, every, keep_every, _ = (config.pop(knob) for knob in HOW)
    first = checkpoints.given(resume, folder)
    last = None
    if not overwrite:
        results.check_config(folder, config)
        if before := results.finished(folder):
            say("This run has finished before: overwrite=true repeats it.")
            rank_zero_only(results.show)(before, folder)
            return before
        last = checkpoints.unfinished(folder)
    tempfile.TemporaryFile(dir=folder).close()  # is an OSError now, not after hours

    recipe: Any = OmegaConf.to_object(cfg.recipe)
    mode = wandb_mode(config["logger"]["mode"])
    start_service(mode)
    data, model = build(cfg, recipe)
    teacher = build_teacher(cfg, model)
    announce(cfg, data, model, teacher is not None)
    started_from = tables.started_from(cfg.checkpoint)
    throughput = Throughput(recipe.batch_size)
    nonfinite = NonFinite(recipe.on_nonfinite_loss == "skip")
    callbacks: list[L.Callback] = [
        nonfinite,
        throughput,
        progress(throughput),
        Signals(),
        checkpoints.LastCheckpoint(folder / "checkpoints", every, keep_every),
        checkpoints.BestCheckpoint(folder / "checkpoints", recipe.full_rate_epoch),
    ]
    if recipe.ema_decay is not None:
        callbacks.append(EMA(recipe.ema_decay, recipe.ema_evaluated))
    if isinstance(model, EViT):
        start, epochs = recipe.shrink_start_epoch, recipe.shrink_epochs
        if isinstance(model, DynamicViT):
            start = epochs = 0  # as its authors train it
        multiple = recipe.token_multiple or (8 if cfg.compile else 1)
        callbacks += [
            KeepRateSchedule(model, start, epochs, multiple),
            KeptPatches(model, folder / "kept_patches.png"),
        ]
    callbacks.append(inference := InferenceSpeed(model))
    trainer = build_trainer(
        cfg.trainer,
        folder,
        callbacks,
        max_epochs=recipe.epochs,
        gradient_clip_val=recipe.clip_grad,
        check_val_every_n_epoch=recipe.eval_every,
    )
    accumulate(trainer, cfg.trainer, recipe)
    data.trainer = trainer
    objective = make_objective(
        model,
        recipe,
        data.num_classes,
        data.local_batch_size,
        data.has_label_maps,
        teacher,
    )
    module = Classifier(model, recipe, data.num_classes, objective, cfg.seed)
    if cfg.compile:
        compile_all(model, objective)
    for step in data.prepare_data, data.setup:  # what can be wrong with the data is said here
        rank_zero_only(step)()
    if last:
        say(f"Going on from {last}: overwrite=true starts anew.")
    else:
        rank_zero_only(results.start)(folder, config)
    steps = checkpoints.optimizer_steps(last) if last else None
    metrics_log = JsonlLogger(folder / "metrics.jsonl", steps)
    last = last or first
    options = config["logger"] | dict(name=folder.name, mode=mode)
    tracker = wandb_logger(folder, config=config, **options)  # is ended below, whatever happens
    trainer.loggers = [metrics_log, *([tracker] if tracker else [])]
    try:
        trainer.fit(module, data, ckpt_path=last, weights_only=True)
        if "val/top1" not in trainer.callback_metrics:  # interrupted after its last epoch
            trainer.loggers = []  # which they know of
            trainer.validate(module, data, ckpt_path=last, verbose=False, weights_only=True)
        peers.done()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        result: dict[str, Any] = dict(
            top1=metrics["val/top1"],
            top5=metrics["val/top5"],
            loss=metrics["val/loss"],
            train_images_per_s=throughput.images_per_s,
            throughput=inference.images_per_s,
            skipped_steps=nonfinite.skipped,
            model=facts(model, data.img_size),
            data=dict(name=data.name, num_classes=data.num_classes),
            choices={group: HydraConfig.get().runtime.choices[group] for group in GROUPS},
            config=config,
            started_from=started_from,
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
        try:
            peers.end(trainer, error)
        finally:
            if tracker:
                tracker.end(1)
        raise
    if tracker:
        tracker.end()
    return result


def build(cfg: DictConfig, recipe: Recipe) -> tuple[Images, torch.nn.Module]:
    """The data module and the model of a configuration; nothing is read or written yet."""
    recipe.check_start(cfg.checkpoint, cfg.pretrained)
    data = instantiate(
        cfg.data,
        recipe=recipe,
        _convert_="object",
    )
    torch.manual_seed(mix_seed(cfg.seed))
    model = instantiate(
        cfg.model, num_classes=data.num_classes, drop_path_rate=recipe.drop_path, _convert_="all"
    )
    data.normalize_for(model)
    if cfg.checkpoint:
        load_checkpoint(model, cfg.checkpoint, new_head=True, new_parts=True)
    return data, model


def compile_all(model: torch.nn.Module, objective: Classification) -> None:
    """torch.compile, in place: one graph for each combination of token counts."""
    private_cache()
    limits: Any = torch._dynamo.config  # type: ignore[attr-defined]
    limits.recompile_limit = limits.accumulated_recompile_limit = 4096
    model.compile(fullgraph=True, dynamic=False)
    objective.compile()


def build_teacher(cfg: DictConfig, model: torch.nn.Module) -> torch.nn.Module | None:
    """The dense model that DynamicViT is distilled from, where there are weights of one.

    Raises:
        ValueError: another kind of model has no use for a teacher, or its weights do not fit.
    """
    source = cfg.recipe.teacher or cfg.checkpoint
    if not isinstance(model, DynamicViT):
        if cfg.recipe.teacher:
            raise ValueError(
                f"recipe.teacher={cfg.recipe.teacher} is for DynamicViT: {type(model).__name__} "
                f"has no distillation; leave it null"
            )
        return None
    if not source and not cfg.pretrained:
        return None
    weights = read_state_dict(source) if source else {}
    own = getattr(model, "pretrained_cfg", None) or {}
    classes = len(weights["head.weight"]) if "head.weight" in weights else own.get("num_classes")
    if classes != model.num_classes and not cfg.recipe.teacher:
        return None  # its logits are of other classes
    teacher = dense_teacher(model)
    if source:
        load_checkpoint(teacher, weights, new_parts=True)
    return teacher


def announce(cfg: DictConfig, data: Images, model: Any, teacher: bool) -> None:
    """Say what will be trained on, and what is left out or not used."""
    recipe, name = cfg.recipe, HydraConfig.get().runtime.choices["model"]
    if set(getattr(model, "keep_rate", [1])) == {1} and cfg.keep_rate != 1:
        say(f"{name} keeps every token: keep_rate and fusion are not used.")
    if isinstance(model, DynamicViT):
        say("DynamicViT drops, at a constant rate: fusion and recipe.shrink_epochs are not used.")
        if not teacher:
            say("Without a teacher of these classes there is no distillation: checkpoint=PATH.")
    elif isinstance(model, LVViT) and not data.has_label_maps:
        say("Without label maps LV-ViT is a plain classifier, no MixToken: data.label_maps=DIR.")
    if data.has_label_maps and (isinstance(model, DynamicViT) or not isinstance(model, LVViT)):
        say(f"{name} has no token labelling: the label maps are not used.")
    text = f"Training on {data.name} ({data.num_classes} classes): {recipe.epochs} epochs, "
    text += f"batch size {recipe.batch_size}"
    if recipe.max_train_images or recipe.max_val_images:
        text += f"; the recipe takes at most {recipe.max_train_images or 'all'} training and "
        text += f"{recipe.max_val_images or 'all'} validation images (recipe.max_train_images, "
        text += "recipe.max_val_images)"
    say(text)


def facts(model: torch.nn.Module, img_size: int) -> dict[str, Any]:
    """What the model is and costs, for the tables."""
    result: dict[str, Any] = dict(
        img_size=img_size,
        params=measure.count_params(model),
        macs_executed=measure.count_macs(model, executed=True),
    )
    if isinstance(model, EViT):
        result |= dict(
            keep_rate=list(model.keep_rate),
            drop_loc=list(model.drop_loc),
            fusion=model.fusion,
            macs=measure.count_macs(model),
        )
    return result
