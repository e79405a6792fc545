"""AdamW and its learning rate."""

import math
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch.optim.lr_scheduler import LambdaLR

from evit.training.recipe import Recipe


def lr_at(epoch: float, recipe: Recipe) -> float:
    """Learning rate after so many epochs: linear from warmup_lr to the peak, then half a cosine."""
    if epoch < recipe.warmup_epochs:
        share = epoch / recipe.warmup_epochs
        return recipe.warmup_lr + (recipe.peak_lr - recipe.warmup_lr) * share
    decay_epochs = recipe.epochs - recipe.warmup_epochs - recipe.cooldown_epochs
    progress = min(1.0, (epoch - recipe.warmup_epochs) / decay_epochs)
    return recipe.min_lr + (recipe.peak_lr - recipe.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def backbone_lr_at(epoch: float, recipe: Recipe) -> float:
    """The same for what is not new in a model that is fine-tuned: slower, and later."""
    return (
        recipe.backbone_lr * lr_at(epoch, recipe) if epoch >= recipe.backbone_frozen_epochs else 0
    )


def make_optimizer(
    model: Any, recipe: Recipe, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW without decay of biases, norms and embeddings, and its schedule over total_steps.

    A model's new_parts learn at recipe.lr, the rest at recipe.backbone_lr times that.
    """
    parts = getattr(model, "new_parts", ())
    is_new = {p: not parts or n.split(".")[0] in parts for n, p in model.named_parameters()}
    decayed = param_groups_weight_decay(
        model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay()
    )
    groups = [
        group | dict(params=params, schedule=schedule)
        for new, schedule in ((True, lr_at), (False, backbone_lr_at))
        for group in decayed
        if (params := [p for p in group["params"] if is_new[p] == new])
    ]
    steps_per_epoch = total_steps / recipe.epochs

    def rate(schedule: Any) -> Any:
        return lambda step: schedule(step / steps_per_epoch, recipe)

    rates = [rate(group.pop("schedule")) for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    return optimizer, LambdaLR(optimizer, rates)
