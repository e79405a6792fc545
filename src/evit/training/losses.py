"""The losses of training, a class for each kind."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evit.config import Recipe
from evit.data.batch import make_mixup, mix_token_box
from evit.data.label_maps import token_targets
from evit.reducers.dynamicvit import divergence


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (..., K) with target distributions (..., K); returns (...)."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1)


def mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Average values (B, N) where chosen (B, N) is not 0; 0 if that is nowhere."""
    return (values * chosen).sum() / chosen.sum().clamp(1)


class Classification:
    """Cross-entropy with mixup and cutmix, distillation from a teacher, or a reducer's own loss.

    any_rate: the largest rate learns from labels, and teaches the one that KeepRateSchedule draws.
    """

    def __init__(self, model, recipe: Recipe, num_classes: int, batch_size: int, teacher=None):
        self.model, self.recipe, self.num_classes = model, recipe, num_classes
        self.mixup = make_mixup(recipe, num_classes, batch_size)
        self.teacher, self.learns = (
            teacher,
            getattr(getattr(model, "reducer", None), "masked", False),
        )

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.recipe.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def __call__(self, images: Tensor, labels: Tensor, *_: Tensor) -> dict[str, Tensor]:
        images, targets = self.mixup(images, labels) if self.mixup else (images, labels)
        if not self.recipe.any_rate:
            return self.losses(images, targets, *self.taught(images))
        own = self.model.keep_rate
        self.model.set_keep_rate(max(self.recipe.any_rate))
        largest = self.model(images)
        self.model.set_keep_rate(own)
        consistency = divergence(self.model(images), largest.detach()).mean()
        loss = self.cross_entropy(largest, targets) + consistency
        return dict(loss=loss, consistency=consistency)

    @torch.no_grad()
    def taught(self, images: Tensor) -> tuple[Tensor, ...]:
        """Ask the teacher for class logits and tokens; () if there is none, or the loss asks it."""
        if self.teacher is None or self.learns:
            return ()
        x = self.teacher.forward_features(images)
        return self.teacher.forward_head(x), self.teacher.token_outputs(x)[1]

    def losses(self, images: Tensor, targets: Tensor, *wanted: Tensor) -> dict[str, Tensor]:
        model, common = self.model, (self.cross_entropy, self.teacher, self.recipe)
        if self.learns:
            return model.reducer.losses(model, images, targets, *common)
        if not wanted:
            return dict(loss=self.cross_entropy(model(images), targets))
        x, ids, reductions = self.encoded(images)
        logits, tokens = model.logits(x, reductions), model.token_outputs(x)[1]
        teachers = wanted[1].take_along_dim(ids.clamp(0)[..., None], 1)
        distance = model.token_distance(tokens, teachers)
        parts = dict(class_distillation=divergence(logits, wanted[0]).mean())
        parts |= dict(token_distillation=mean_of(distance, ids >= 0))
        loss = self.cross_entropy(logits, targets)
        return dict(loss=loss + self.recipe.distill_weight * sum(parts.values()), **parts)

    def encoded(self, images: Tensor, *swapped: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Encode to normalised tokens (B, T, C), their patch ids (B, N; -1: none), reductions."""
        model = self.model
        x = model.embed(images, *swapped)
        ids = model.patch_ids(x)
        x, reductions = model.encode(x)
        for reduction in reductions:
            ids = reduction.ids(ids)
        return model.norm(x), ids, reductions


class TokenLabels(Classification):
    """LV-ViT's token labels with MixToken: a token learns its patch's (merged: its leader's)."""

    def __call__(self, images: Tensor, labels: Tensor, *more: Tensor) -> dict[str, Tensor]:
        (maps, crops, *warps), grid = more, self.model.patch_embed.grid_size
        sizes = self.num_classes, grid, self.recipe.label_smoothing
        of_class, of_patches = token_targets(maps, crops, *sizes, *warps)
        swapped = mix_token_box(grid).to(images.device).flatten()
        share = swapped.float().mean()
        of_class = (1 - share) * of_class + share * of_class.flip(0)
        of_patches = torch.where(swapped[:, None], of_patches.flip(0), of_patches)
        return self.losses(images, of_class, of_patches, swapped)

    def losses(self, images: Tensor, targets: Tensor, *more: Tensor) -> dict[str, Tensor]:
        of_patches, swapped = more
        x, ids, _ = self.encoded(images, swapped)
        class_logits, token_logits = self.model.heads(x)
        of_tokens = of_patches.take_along_dim(ids.clamp(0)[..., None], 1)
        token_loss = mean_of(soft_cross_entropy(token_logits, of_tokens), ids >= 0)
        class_loss = soft_cross_entropy(class_logits, targets).mean()
        loss = class_loss + self.recipe.token_label_weight * token_loss
        return dict(loss=loss, class_loss=class_loss, token_loss=token_loss)


def dense_teacher(model: Any) -> Any:
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    teacher.set_keep_rate(1.0)
    return teacher


def make_objective(model, recipe, num_classes, batch_size, label_maps=False, teacher=None) -> Any:
    """Choose the loss: the reducer's own, token labels if there is a head for them, or plain."""
    reducer: Any = getattr(model, "reducer", None)
    learns, taught = reducer is not None and reducer.masked, teacher is not None
    if recipe.any_rate and (taught or reducer is None or learns or reducer.own or reducer.given):
        raise ValueError("recipe.any_rate is for a reducer of keep rates, and has its own teacher")
    if label_maps and (recipe.any_rate or (taught and not learns)):
        raise ValueError("recipe.any_rate and recipe.teacher need data.label_maps=null")
    labelled = label_maps and hasattr(model, "heads") and not learns
    if labelled and (recipe.mixup or recipe.cutmix):
        raise ValueError("token labels need MixToken, not mixup and cutmix: take recipe=lvvit")
    kind = TokenLabels if labelled else Classification
    return kind(model, recipe, num_classes, batch_size, teacher)
