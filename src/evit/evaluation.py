"""One evaluation: read a checkpoint, build what it needs, measure, write evaluation.json."""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from evit import load_checkpoint, measure
from evit.config import listed, overridden
from evit.data import Images
from evit.models import EViT
from evit.models.vit import per_reorganization
from evit.models.weights import read_state_dict
from evit.report import evaluations, results
from evit.tokens import SELECTIONS
from evit.training.evaluator import Evaluator, Setting, has_choices
from evit.training.progress import progress
from evit.training.trainer import Signals, build_trainer, quiet, say

# Of a checkpoint that is not of a run, where nothing else is given.
DEFAULTS = dict(keep_rate=0.7, fusion=True, img_size=224, crop_pct=0.875, max_val_images=None)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate by a composed configuration; leave evaluation.json in Hydra's run folder.

    Raises:
        ValueError: the configuration cannot be served; nothing has been written.
        RuntimeError: with verify, a setting on its own gives other numbers.
    """
    quiet()
    given = overridden(HydraConfig.get().overrides.task)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if not cfg.checkpoint:
        raise ValueError("checkpoint=PATH is needed: a run's checkpoints/best.ckpt, or a .pth file")
    weights = read_state_dict(cfg.checkpoint)
    config = complete(cfg, given, results.run_config(cfg.checkpoint))
    options = dict(max_epochs=1, enable_checkpointing=False)
    callbacks: list[L.Callback] = [Signals(), *progress()]
    trainer = build_trainer(cfg.trainer, folder, callbacks, **options)
    data, model = build(config, weights, trainer)
    settings = choose_settings(config, model, given)
    costs = [cost(model, setting) for setting in settings]
    announce(data, config, len(settings))
    for step in data.prepare_data, data.setup:  # what can be wrong with the data is said here
        rank_zero_only(step)()

    evaluator = Evaluator(model, settings, data.num_classes, config["seed"])
    seconds = one_pass(trainer, evaluator, data)
    rows = [
        vars(setting) | found | cost
        for setting, found, cost in zip(settings, evaluator.results, costs, strict=True)
    ]
    result: dict[str, Any] = dict(
        checkpoint=str(cfg.checkpoint),
        checkpoint_sha256=results.sha256(Path(cfg.checkpoint)),
        settings=rows,
        images=rows[0]["images"],
        model=dict(
            name=model_name(config, cfg.checkpoint),
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
    if config["verify"]:
        result["verify"] = verify(trainer, evaluator, data, config["repeats"])
    if trainer.is_global_zero:
        result |= results.provenance()
        folder.mkdir(parents=True, exist_ok=True)
        results.write_json(result, folder / "evaluation.json")
        evaluations.show(result, folder / "evaluation.json")
    return result


def model_name(config: dict[str, Any], checkpoint: str | None) -> str:
    """The model's name among conf/model: as chosen, or as the checkpoint's run had it."""
    chosen = HydraConfig.get().runtime.choices.get("model")
    if chosen and chosen != "null":
        return chosen
    folder = results.run_folder(checkpoint) if checkpoint else None
    before = results.finished(folder) if folder else None
    return before["choices"]["model"] if before else config["model"].get("model_name", "model")


def complete(cfg: DictConfig, given: set[str], source: dict[str, Any]) -> dict[str, Any]:
    """The configuration as plain values, with what was not given from the run, or by default.

    Raises:
        ValueError: no model is given, or a knob is out of range.
    """
    cfg = cfg.copy()
    complete_model(cfg, source)
    complete_data(cfg, given, source)
    for knob in ("crop_pct", "max_val_images"):
        if cfg[knob] is None and not (knob == "max_val_images" and knob in given):  # null: all
            cfg[knob] = (DEFAULTS | source)[knob]
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for knob in ("batch_size", "repeats", "max_val_images"):
        if config[knob] is not None and config[knob] < 1:
            raise ValueError(f"{knob} must be at least 1, got {config[knob]}")
    if not 0.01 <= config["crop_pct"] <= 1:
        raise ValueError(f"crop_pct must be from 0.01 to 1, got {config['crop_pct']}")
    return config


def complete_data(cfg: DictConfig, given: set[str], source: dict[str, Any]) -> None:
    """Fill in the data: what was not given from the run, where data=NAME was not.

    Args:
        cfg: with data, and a model that is complete; changed in place.
        given: the names of what was given on the command line.
        source: run_config of the checkpoint.
    """
    if source and "data" not in given:
        changed = {name: cfg.data[name] for name in cfg.data if f"data.{name}" in given}
        cfg.data = OmegaConf.merge(source["data"], changed)
    elif "data.backend" not in given:
        root = Path(cfg.data.get("root") or "").expanduser()
        cfg.data.backend = "ffcv" if (root / "val.beton").is_file() else "imagefolder"
    if "img_size" in cfg.data:  # that of a run is a value, not ${img_size}
        cfg.data.img_size = cfg.img_size


def complete_model(cfg: DictConfig, source: dict[str, Any]) -> None:
    """Fill in the model and its knobs: what was not given from the run, or by default.

    Args:
        cfg: with checkpoint, model, keep_rate, fusion and img_size; changed in place.
        source: run_config of the checkpoint.

    Raises:
        ValueError: no model is given.
    """
    if "_target_" not in cfg.model:
        if not source:
            raise ValueError(
                f"model=NAME is needed, as in model=evit_deit: {cfg.checkpoint} is not a run's, "
                f"whose config.json would tell (RUN/checkpoints/, with RUN/config.json)"
            )
        cfg.model = OmegaConf.merge(source["model"], cfg.model)
    model: Any = OmegaConf.to_container(cfg.model)
    own: Any = dict(keep_rate=1) | model  # 1 where the model has no such knob
    own = {knob: value for knob, value in own.items() if value != f"${{{knob}}}"}
    for knob in ("keep_rate", "fusion", "img_size"):
        if cfg[knob] is None:
            cfg[knob] = (DEFAULTS | source | own)[knob]
    if "img_size" in cfg.model:  # that of a run is a value, not ${img_size}
        cfg.model.img_size = cfg.img_size
    if "pretrained" in cfg.model:  # the weights are the checkpoint's
        cfg.model.pretrained = False


def build(
    config: dict[str, Any], weights: Mapping[str, Tensor], trainer: L.Trainer
) -> tuple[Images, nn.Module]:
    """The data module and the model, with its weights; nothing is written yet."""
    data = instantiate(
        config["data"],
        batch_size=config["batch_size"] * trainer.world_size * trainer.accumulate_grad_batches,
        max_val_images=config["max_val_images"],
        crop_pct=config["crop_pct"],
        splits=["val"],
        _convert_="all",
    )
    data.trainer = trainer
    head = weights.get("head.weight")
    if head is not None and len(head) != data.num_classes:
        raise ValueError(
            f"the checkpoint has {len(head)} classes and {data.name} has {data.num_classes}: "
            f"give the data that it was trained on, data.root=DIR"
        )
    options = {k: v for k, v in config["model"].items() if k != "keep_rate" and k != "fusion"}
    model = instantiate(options, num_classes=data.num_classes, _convert_="all")
    load_checkpoint(model, weights)
    data.normalize_for(model)
    return data, model


def choose_settings(config: dict[str, Any], model: nn.Module, given: set[str]) -> list[Setting]:
    """Every keep rate with every fusion and selection, each once, and a dense model once.

    Raises:
        ValueError: a value is out of range, or this model has no such setting.
    """
    rates = config["keep_rates"]
    if rates is None:
        rates = [config["keep_rate"]]
    if not isinstance(rates, list) or not rates:
        raise ValueError(f"keep_rates must be a list such as [1,0.7,0.5], got {rates!r}")
    fusions, selections = listed(config["fusion"]), listed(config["selection"])
    if not fusions or not all(isinstance(fusion, bool) for fusion in fusions):
        raise ValueError(f"fusion must be true, false or [true,false], got {config['fusion']!r}")
    if not selections or not set(selections) <= set(SELECTIONS):
        raise ValueError(
            f"selection, which tokens are kept, must be of {', '.join(SELECTIONS)}, "
            f"got {config['selection']!r}"
        )
    if isinstance(model, EViT):
        count = len(model.drop_loc)
    elif all(listed(rate) == [1] for rate in rates):
        count = 1
    else:
        raise ValueError(
            f"{type(model).__name__} reorganizes no tokens: keep_rate=1, or take it as an EViT "
            f"with model=timm_vit model.model_name=NAME"
        )
    if not has_choices(model):
        fusions, selections = [None], [None]
        if named := sorted(given & {"fusion", "selection"}):
            text = f"{type(model).__name__} has no {' and no '.join(named)}: that is left out."
            say(text)
    settings = []
    for rate in rates:
        per = per_reorganization(rate, count)
        dense = Setting(per).dense
        settings += [
            Setting(per) if dense else Setting(per, fusion, selection)
            for selection in selections
            for fusion in fusions
        ]
    return list(dict.fromkeys(settings))


def announce(data: Images, config: dict[str, Any], settings: int) -> None:
    """Say what is evaluated on, and how much of it."""
    text = f"Evaluating {settings} setting{'s' * (settings > 1)} on {data.name} "
    text += f"({data.num_classes} classes), read by {data.backend}"
    if limit := config["max_val_images"]:
        text += f"; at most {limit} validation images (max_val_images=null takes all)"
    say(text)


def cost(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """Multiply-accumulates of one image: as the published tables count, and as computed here."""
    setting.apply(model)
    published = measure.count_macs(model) if isinstance(model, EViT) else None
    return dict(macs=published, macs_executed=measure.count_macs(model, executed=True))


def one_pass(trainer: L.Trainer, evaluator: Evaluator, data: Images) -> float:
    """Evaluate on all validation images; seconds."""
    started = time.perf_counter()
    trainer.validate(evaluator, data, verbose=False)
    return time.perf_counter() - started


def verify(trainer: L.Trainer, shared: Evaluator, data: Images, repeats: int) -> dict[str, Any]:
    """Time the shared pass and, after it, one pass for every setting on its own; `repeats` times.

    Raises:
        RuntimeError: the numbers of a setting differ; it is named.
    """
    expected, times = shared.results, []
    for repeat in range(repeats):
        seconds = [one_pass(trainer, shared, data)]
        for setting, wanted in zip(shared.settings, expected, strict=True):
            alone = Evaluator(shared.model, [setting], data.num_classes, shared.seed, shared=False)
            seconds.append(one_pass(trainer, alone, data))
            if alone.results != [wanted]:
                raise RuntimeError(
                    f"verify: on its own, {setting} gives {alone.results[0]}, not {wanted}"
                )
        times.append((seconds[0], sum(seconds[1:])))
        text = f"verify {repeat + 1}/{repeats}: one pass for all {times[-1][0]:.2f} s, "
        text += f"one for each {times[-1][1]:.2f} s; the numbers are equal"
        say(text)
    return dict(
        shared_seconds=[round(together, 3) for together, _ in times],
        separate_seconds=[round(apart, 3) for _, apart in times],
        ratio=round(statistics.median(together / apart for together, apart in times), 4),
    )
