"""AdamW and its learning rate."""

import math
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch.optim.lr_scheduler import LambdaLR

from evit.config import Recipe


def lr_at(epoch: float, recipe: Recipe) -> float:
    """Learning rate at a (fractional) epoch: linear warm-up to the peak, then half a cosine.

    recipe.lr_schedule:
        plain: changes at every step; the cosine starts at the peak, after the warm-up.
        timm: constant within an epoch. The cosine spans all epochs except the cooldown, and the
            warm-up replaces its beginning (timm's train.py, LV-ViT).
        deit: as timm, one epoch late: DeiT's and EViT's loops step the scheduler after an epoch
            with that epoch's number, so the first two epochs run at warmup_lr.
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


def make_optimizer(
    model: Any, recipe: Recipe, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW and its schedule over total_steps; no decay of biases, norms and embeddings.

    The parameters of a reducer use recipe.lr; the backbone of such a model uses recipe.backbone_lr
    times that, after recipe.backbone_frozen_epochs.
    """
    new = {id(p) for n, p in model.named_parameters() if n.startswith("reducer.")}
    decayed = param_groups_weight_decay(
        model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay()
    )
    steps_per_epoch = total_steps / recipe.epochs

    def rate(scale: float, first_epoch: float, step: int) -> float:
        epoch = step / steps_per_epoch
        return 0.0 if epoch < first_epoch else scale * lr_at(epoch, recipe)

    groups, rates = list[Any](), list[Any]()
    kinds = [(True, 1.0, 0.0), (False, recipe.backbone_lr, recipe.backbone_frozen_epochs)]
    for of_reducer, scale, first_epoch in kinds if new else [(False, 1.0, 0.0)]:
        for group in decayed:
            chosen = [p for p in group["params"] if (id(p) in new) == of_reducer]
            if chosen:
                groups.append(group | dict(params=chosen, lr_scale=scale))
                rates.append(partial(rate, scale, first_epoch))
    cuda = torch.cuda.is_available() and groups[0]["params"][0].is_cuda
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=cuda or None)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # or none is clipped
    return optimizer, LambdaLR(optimizer, rates)
