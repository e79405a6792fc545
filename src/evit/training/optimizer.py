"""AdamW and its learning rate."""

import math
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch.optim.lr_scheduler import LambdaLR

from evit.recipe import Recipe


def lr_at(epoch: float, recipe: Recipe) -> float:
    """Learning rate after so many epochs: linear from warmup_lr to the peak, then half a cosine.

    recipe.lr_schedule says how:
        plain: at every step its own; the cosine begins where warm-up ends, at the peak.
        timm: one for each epoch. The cosine spans all epochs but the cooldown, and warm-up stands
            in for its beginning: CosineLRScheduler as timm's train.py steps it, LV-ViT's too.
        deit: the same, an epoch late, for DeiT's loop (and EViT's) steps timm's scheduler after
            each epoch with that epoch's number: the first two are both at warmup_lr.
    """
    start: float = recipe.warmup_epochs
    if recipe.lr_schedule != "plain":
        start, epoch = 0, math.floor(epoch)
        if recipe.lr_schedule == "deit":
            epoch = max(epoch - 1, 0)
    if epoch < recipe.warmup_epochs:
        share = epoch / recipe.warmup_epochs
        return recipe.warmup_lr + (recipe.peak_lr - recipe.warmup_lr) * share
    progress = min(1.0, (epoch - start) / (recipe.epochs - recipe.cooldown_epochs - start))
    return recipe.min_lr + (recipe.peak_lr - recipe.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def backbone_lr_at(epoch: float, recipe: Recipe) -> float:
    """The same for what is not new in a model that is fine-tuned: slower, and later."""
    return (
        recipe.backbone_lr * lr_at(epoch, recipe) if epoch >= recipe.backbone_frozen_epochs else 0
    )


def new_parts(model: Any) -> tuple[str, ...]:
    """The parts of a model that a dense checkpoint lacks: a reducer with parameters."""
    new = any(name.startswith("reducer.") for name, _ in model.named_parameters())
    return ("reducer",) if new else ()


def make_optimizer(
    model: Any, recipe: Recipe, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW without decay of biases, norms and embeddings, and its schedule over total_steps.

    The new_parts of a model learn at recipe.lr, the rest at recipe.backbone_lr times that.
    """
    parts = new_parts(model)
    is_new = {p: not parts or n.split(".")[0] in parts for n, p in model.named_parameters()}
    decayed = param_groups_weight_decay(
        model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay()
    )
    groups = [
        group | dict(params=params, schedule=schedule, lr_scale=scale)
        for new, schedule, scale in (
            (True, lr_at, 1.0),
            (False, backbone_lr_at, recipe.backbone_lr),
        )
        for group in decayed
        if (params := [p for p in group["params"] if is_new[p] == new])
    ]
    steps_per_epoch = total_steps / recipe.epochs

    def rate(schedule: Any) -> Any:
        return lambda step: schedule(step / steps_per_epoch, recipe)

    rates = [rate(group.pop("schedule")) for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # or none is clipped
    return optimizer, LambdaLR(optimizer, rates)
