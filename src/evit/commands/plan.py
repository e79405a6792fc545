"""The plan of a run, printed as YAML by --dry-run: nothing is trained, downloaded or written."""

from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from evit import measure
from evit.commands.build import build_data, build_model
from evit.config import Recipe, listed
from evit.data.order import epoch_length
from evit.reducers.schedule import keep_rate_at
from evit.report import paper, results
from evit.training.losses import make_objective
from evit.training.module import Classifier
from evit.training.optimizer import make_optimizer

IMAGENET = dict(name="ImageNet", num_classes=1000, train_images=1_281_167, val_images=50_000)
GPUS = 8  # of the estimate of hours


def run(cfg: DictConfig) -> dict[str, Any]:
    """Print the plan of a composed configuration, and return it."""
    found = plan(cfg)
    shown = found | dict(schedule={k: sampled(v) for k, v in found["schedule"].items()})
    shown["paper"] = [f"{row['top1']} top-1 ({row['table']})" for row in found["paper"]]
    if found["hours"]:
        shown["hours"] = f"about {found['hours']:.0f} h on {GPUS} A100, from the paper's images/s"
    print(yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=100), end="")
    return found


def sampled(values: list[Any]) -> Any:
    """A rate of every epoch as {epoch: rate}: every tenth epoch and the last, or one for all."""
    values = [results.one_rate([float(f"{r:.4g}") for r in listed(value)]) for value in values]
    if all(value == values[0] for value in values):
        return values[0]
    chosen = sorted({*range(0, len(values), 10), len(values) - 1})
    return {epoch: values[epoch] for epoch in chosen}


def plan(cfg: DictConfig) -> dict[str, Any]:
    """What a run would do beyond what its configuration says; rates are one for each epoch."""
    recipe: Any = OmegaConf.to_object(cfg.recipe)
    data = data_facts(cfg, recipe)
    images = epoch_length(data["train_images"], recipe.repeated_augmentations)
    if not (steps := images // recipe.batch_size):
        raise ValueError(
            f"{data['train_images']} training images do not fill one step of {recipe.batch_size}: "
            f"lower recipe.batch_size"
        )
    with torch.device("meta"):
        model = build_model(cfg, recipe, data["num_classes"], pretrained=False)
    masked = getattr(getattr(model, "reducer", None), "masked", False)  # DynamicViT
    start = "checkpoint" if cfg.checkpoint else "pretrained" if cfg.pretrained else "random"
    parts = (model, recipe, data["num_classes"])
    objective = make_objective(*parts, recipe.batch_size, data["label_maps"])
    Classifier(*parts, objective)  # freezes what the recipe says
    shrink = (0, 0) if masked else (recipe.shrink_start_epoch, recipe.shrink_epochs)
    epochs, final = range(recipe.epochs), list(getattr(model, "keep_rate", ()))
    keep_rates = [list(keep_rate_at(epoch, 1, final, *shrink)) for epoch in epochs]
    optimizer, scheduler = make_optimizer(model, recipe, total_steps=recipe.epochs)
    rates = [[rate(epoch) for epoch in epochs] for rate in scheduler.lr_lambdas]
    backbone = dict(backbone_lr=rates[-1]) if rates[-1] != rates[0] else {}
    groups = [
        dict(tensors=len(group["params"]), parameters=sum(p.numel() for p in group["params"]))
        | {name: group[name] for name in ("weight_decay", "lr_scale")}
        for group in optimizer.param_groups
    ]
    batches = []
    for processes in (1, 4, 8, 16):
        count = cfg.trainer.accumulate_grad_batches or recipe.accumulation(processes)
        share, left = divmod(recipe.batch_size, processes * count)
        if not left:
            batches.append(dict(processes=processes, per_process=share, accumulation=count))
    rows = rows_of_paper(cfg, recipe, model, data, masked)
    forwards = 3 + (masked and bool(recipe.teacher or start != "random"))
    defaults = optimizer.defaults
    return dict(
        data=data,
        start="missing" if recipe.finetune and start == "random" else start,
        steps_per_epoch=steps,
        loss=type(objective).__name__,
        optimizer=dict(name=type(optimizer).__name__, betas=list(defaults["betas"]))
        | dict(eps=defaults["eps"], groups=groups),
        schedule=dict(lr=rates[0]) | backbone | dict(keep_rate=keep_rates),
        batches=batches,
        paper=rows,
        hours=hours(model, keep_rates, steps * recipe.batch_size, rows, masked, forwards),
    )


def data_facts(cfg: DictConfig, recipe: Recipe) -> dict[str, Any]:
    """The images and classes that a run would have; ImageNet's where no folder of it is given."""
    imagenet = cfg.data.get("num_classes") == 1000
    if imagenet and not cfg.data.get("root"):
        facts: dict[str, Any] = IMAGENET | dict(label_maps=bool(cfg.data.label_maps))
    else:
        data = build_data(cfg, recipe)
        facts = dict(name=IMAGENET["name"] if imagenet else data.name, num_classes=data.num_classes)
        facts |= {f"{split}_images": data.num_images(split) for split in data.splits}
        facts |= dict(label_maps=data.has_label_maps)
    for split, limit in (("train", recipe.max_train_images), ("val", recipe.max_val_images)):
        facts[f"{split}_images"] = min(facts[f"{split}_images"], limit or facts[f"{split}_images"])
    return facts


def rows_of_paper(
    cfg: DictConfig, recipe: Recipe, model: Any, data: dict[str, Any], masked: bool
) -> list[dict[str, Any]]:
    """The rows of the paper's tables that this run reproduces."""
    rates = set(getattr(model, "keep_rate", ()))
    labelled = data["label_maps"] or masked or not hasattr(model, "heads")
    if data["name"] != IMAGENET["name"] or len(rates) != 1 or not labelled:
        return []
    (keep_rate,) = rates
    return paper.runs(
        cfg.model.model_name,
        keep_rate=keep_rate,
        fusion=None if keep_rate == 1 or masked else model.fusion,
        img_size=cfg.img_size,
        finetuned=recipe.finetune,
        epochs=round(recipe.epochs - recipe.cooldown_epochs),
    )


def hours(
    model: Any, keep_rates: list[Any], images: int, rows: list[Any], masked: bool, forwards: int
) -> float | None:
    """Estimated hours of training on 8 of the paper's GPUs; None for a run not in the paper.

    An image costs three forward passes (four with a teacher) at the paper's images/s, scaled by the
    MACs at the keep rate of its epoch. DynamicViT drops nothing in training, so it counts at the
    dense model's images/s.
    """
    if not rows or not hasattr(model, "reducer"):
        return None
    macs = {}
    for rates in {tuple(rates) for rates in keep_rates}:
        model.set_keep_rate(rates)
        macs[rates] = measure.count_macs(model)
    equivalent = images * sum(macs[tuple(r)] for r in keep_rates) / macs[tuple(keep_rates[-1])]
    throughput = paper.dense_throughput("deit_s") if masked else rows[0]["throughput"]
    return equivalent * forwards / (throughput * GPUS) / 3600
