"""Train a model: prepare, fit, evaluate, and write result.json."""

import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from evit.commands.plan import build_module
from evit.config import Recipe, counted, overridden, plain
from evit.files import telling
from evit.measure import count_macs, count_params, speed
from evit.report import results
from evit.tracking import JsonlLogger, wandb_logger, wandb_mode
from evit.training import build_trainer, callbacks, say


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train; leave result.json in the run's folder. A finished run is shown, not repeated."""
    folder, started = Path(HydraConfig.get().runtime.output_dir), time.monotonic()
    choices, config = HydraConfig.get().runtime.choices, plain(cfg)
    if not cfg.overwrite:
        if before := results.finished(folder, config):
            say("This run has finished before: overwrite=true repeats it.")
            rank_zero_only(results.show)(before, folder)
            return before
    recipe: Any = OmegaConf.to_object(cfg.recipe)
    check(cfg)
    first, seen = callbacks.given(cfg.resume, folder)
    last, steps = (None, 0) if cfg.overwrite else callbacks.unfinished(folder)
    tempfile.TemporaryFile(dir=folder).close()  # is an OSError now, not after hours
    mode = wandb_mode(config["logger"]["mode"])
    beside = make_callbacks(cfg, recipe, folder)
    options = dict(max_epochs=recipe.epochs, gradient_clip_val=recipe.clip_grad, callbacks=beside)
    options |= dict(check_val_every_n_epoch=recipe.eval_every, plugins=[callbacks.WholeFiles()])
    trainer = build_trainer(cfg.trainer, default_root_dir=folder, **options)
    if cfg.trainer.accumulate_grad_batches is None:
        trainer.accumulate_grad_batches = recipe.accumulation(trainer.world_size)
    data = instantiate(cfg.data, recipe=recipe, _convert_="object")
    data.trainer = trainer
    module = build_module(cfg, recipe, data, config)
    announce(cfg, recipe, data, module)
    for step in data.prepare_data, data.setup:  # raises the errors of the data here
        rank_zero_only(step)()
    if last:
        say(f"Going on from {last}: overwrite=true starts anew.")
    else:
        if first:
            callbacks.require_unfinished(first, seen, data, recipe.epochs)
        rank_zero_only(results.start)(folder, config)
    metrics = JsonlLogger(folder / "metrics.jsonl", steps)
    trainer.loggers = [metrics]
    tracker = mirror(trainer, folder, config, mode)
    quiet = beside[0].bar or not trainer.is_global_zero
    with ExitStack() as stack, telling(lambda: "" if quiet else beside[0].waiting):
        if tracker:
            stack.push(lambda error, *_: tracker.end(int(error is not None)))
        found = fit(trainer, module, data, last or first)
        model = module.model
        facts = dict(img_size=data.img_size, params=count_params(model))
        facts |= dict(macs=count_macs(model), macs_executed=count_macs(model, executed=True))
        facts |= dict(reducer=model.reducer.name, fusion=model.fusion)
        facts |= dict(keep_rate=list(model.keep_rate), drop_loc=list(model.drop_loc))
        groups = ("reducer", "model", "data", "recipe", "experiment")
        result: dict[str, Any] = {name: found[f"val/{name}"] for name in ("top1", "top5", "loss")}
        result |= dict(train_images_per_s=beside[0].images_per_s)
        result |= throughput(trainer, model, data.img_size) | dict(model=facts)
        result |= dict(data=dict(name=data.name, num_classes=data.num_classes))
        result |= dict(choices={group: choices[group] for group in groups}, config=config)
        result |= dict(started_from=results.started_from(config["checkpoint"] or first))
        result |= dict(processes=trainer.world_size, precision=str(trainer.precision))
        result |= dict(device=results.device_name(trainer.strategy.root_device))
        result |= dict(seconds=round(metrics.earlier + time.monotonic() - started, 1))
        result |= dict(wandb_id=tracker and tracker.run_id)
        if trainer.is_global_zero:
            results.write_json(result := result | results.provenance(), folder / "result.json")
            if tracker:
                tracker.log_summary(results.summary(result))
            results.show(result, folder)
    return result


def check(cfg: DictConfig) -> None:
    """Raise a ValueError for invalid knobs, or knobs that need another one."""
    for knob in "checkpoint_every_n_steps", "keep_checkpoint_every_n_epochs":
        if cfg[knob] is not None and not (isinstance(cfg[knob], int) and cfg[knob] >= 1):
            raise ValueError(f"{knob} must be at least 1, got {cfg[knob]}")
    modes, precisions = "true, false, reduce-overhead", "auto, 32-true, bf16-mixed, 16-mixed"
    for knob, allowed in {"compile": modes, "trainer.precision": precisions}.items():
        if str(value := OmegaConf.select(cfg, knob)).lower() not in allowed.split(", "):
            raise ValueError(f"{knob} must be one of {allowed}, got {value!r}")
    if cfg.recipe.finetune and not cfg.checkpoint and not cfg.pretrained:
        way = "checkpoint=PATH, or pretrained=true for timm's; recipe.finetune=false: random ones"
        raise ValueError(f"this recipe fine-tunes a trained model: give its weights by {way}")


def make_callbacks(cfg: DictConfig, recipe: Recipe, folder: Path) -> list[Any]:
    """The run's callbacks in the order of their calls; Progress is first."""
    inside, every = folder / "checkpoints", cfg.checkpoint_every_n_steps
    found: list[Any] = [callbacks.Progress(recipe.batch_size, sys.stdout.isatty())]
    found += [callbacks.LastCheckpoint(inside, every, cfg.keep_checkpoint_every_n_epochs)]
    found += [callbacks.BestCheckpoint(inside, recipe.full_rate_epoch)]
    if recipe.ema_decay is not None:
        found += [callbacks.EMA(recipe.ema_decay, recipe.ema_evaluated)]
    multiple = recipe.token_multiple or (8 if cfg.compile else 1)
    shrink = (recipe.shrink_start_epoch, recipe.shrink_epochs, multiple)
    pictures = callbacks.KeptPatches(folder / "kept_patches.png")
    return [*found, callbacks.KeepRateSchedule(*shrink), pictures]


def announce(cfg: DictConfig, recipe: Recipe, data: Any, module: Any) -> None:
    """Print the data and schedule of the run, and the given knobs that have no effect."""
    model, choices = module.model, HydraConfig.get().runtime.choices
    dense, no_teacher = set(model.keep_rate) == {1}, not module.objective.teacher
    masked = model.reducer.masked  # DynamicViT
    fixed = dense or masked or model.reducer.own or model.reducer.given or bool(recipe.any_rate)
    without_effect = {
        "keep_rate": dense and cfg.keep_rate != 1,
        "fusion": dense or not hasattr(model.reducer, "fusion"),
        "recipe.shrink_epochs recipe.shrink_start_epoch recipe.token_multiple": fixed,
        "recipe.ratio_weight": not masked,
        "recipe.distill_weight": no_teacher,
        "recipe.token_label_weight": not data.has_label_maps,
        "data.label_maps": not hasattr(model, "heads"),
        "recipe.mixup_mode recipe.mixup_switch_prob": not recipe.mixup and not recipe.cutmix,
        "recipe.ema_evaluated": recipe.ema_decay is None,
        "pretrained": cfg.checkpoint,
    }
    given = overridden(HydraConfig.get().overrides.task)
    names = [name for group, idle in without_effect.items() if idle for name in group.split()]
    if idle := [name for name in names if name in given and OmegaConf.select(cfg, name)]:
        say(f"Without effect here (model={choices['model']}): {', '.join(idle)}.")
    if masked and no_teacher:
        say("Without a teacher of these classes there is no distillation: checkpoint=PATH.")
    elif hasattr(model, "heads") and not data.has_label_maps:
        say("Without label maps LV-ViT is a plain classifier, no MixToken: data.label_maps=DIR.")
    if cfg.compile:
        say("Compiling in the first steps: minutes at first, then from the cache.")
    text = f"Training on {data.name} ({data.num_classes} classes, scale={choices['scale']}): "
    text += f"{counted(recipe.epochs, 'epoch')}, batch size {recipe.batch_size}"
    for knob in ("max_train_images", "max_val_images"):
        text += f", recipe.{knob}={cfg.recipe[knob]}" if cfg.recipe[knob] else ""
    say(text)


def mirror(trainer: Any, folder: Path, config: dict[str, Any], mode: str) -> Any:
    """Copy metrics.jsonl to the chosen logger; return it if it is a Tracker, W&B's."""
    options, choice = config["logger"], HydraConfig.get().runtime.choices["logger"]
    if "_target_" in options:  # one of Lightning's own
        kind = dict(_target_=options["_target_"], save_dir=folder, name="", version=choice)
        trainer.loggers.append(instantiate(kind))
        return None
    tracker = wandb_logger(folder, config=config, **options | dict(name=folder.name, mode=mode))
    trainer.loggers += [tracker] if tracker else []
    return tracker


def fit(trainer: Any, module: Any, data: Any, checkpoint: Path | None) -> dict[str, float]:
    """Train, from the beginning or from a checkpoint; return the metrics of the last evaluation."""
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except (RuntimeError, KeyError) as error:
        if not checkpoint or trainer.global_step or "load" not in str(error):
            raise
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{checkpoint} is of another model or recipe: {reason}") from error
    except SystemExit as error:  # status 1 is what Lightning makes of Ctrl-C
        raise KeyboardInterrupt if error.code == 1 else error from None
    if "val/top1" not in trainer.callback_metrics:  # it was interrupted before that
        trainer.loggers = []  # which have it already
        trainer.validate(module, data, ckpt_path=checkpoint, verbose=False, weights_only=True)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@torch.no_grad()
def throughput(trainer: Any, model: Any, img_size: int, fast: Any = None) -> dict[str, Any]:
    """Images/s of inference in one process, as the run is, or `fast` as on a GPU; and the mode."""
    device = trainer.strategy.root_device
    batch_size, mode = 8 if device.type == "cpu" else 128, str(trainer.precision)
    images = torch.rand(batch_size, 3, img_size, img_size, device=device)
    model, context = model.to(device).eval(), trainer.precision_plugin.forward_context()
    forward = model.forward
    if device.type == "cuda" if fast is None else fast:
        say("Compiling the model, to measure its speed")
        speed.keep_compiled()
        model, images, context = deepcopy(model).bfloat16(), images.bfloat16(), nullcontext()
        forward, mode = torch.compile(model.forward, dynamic=False), "bf16-true, compiled"
    try:
        with context:
            calls = speed.warm_up(lambda: forward(images), 0.2, device)
            seconds = speed.timed(lambda: forward(images), calls, device)
    except Exception as error:  # such as a compiler's: the finished training must not fail
        say(f"The speed of inference is not measured: {error}".splitlines()[0])
        return dict(throughput=None, throughput_mode=None)
    return dict(throughput=calls * batch_size / seconds, throughput_mode=mode)
