"""What a training batch is charged, for each kind of model."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evit.data.batch import make_mixup
from evit.models import DynamicViT, LVViT
from evit.training.recipe import Recipe


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of logits (..., K), to (...)."""
    student, teacher = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def mean_where(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of the values whose weight is 1; zero if none is."""
    return (values * weight).sum() / weight.sum().clamp(1)


class Classification:
    """Cross-entropy of mixed images with smoothed labels.

    Called with a batch (images, labels), returns the loss under "loss", and its parts.
    """

    def __init__(self, model: Any, recipe: Recipe, num_classes: int, batch_size: int):
        self.model, self.recipe, self.num_classes = model, recipe, num_classes
        self.mixup = make_mixup(
            num_classes,
            recipe.mixup,
            recipe.cutmix,
            recipe.mixup_switch_prob,
            recipe.label_smoothing,
            batch_size,
        )

    def to(self, device: torch.device) -> None:
        """Move what is not the trained model's."""

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.recipe.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def __call__(self, images: Tensor, labels: Tensor, *_: Tensor) -> dict[str, Tensor]:
        images, targets = (images, labels) if self.mixup is None else self.mixup(images, labels)
        return dict(loss=self.cross_entropy(self.model(images), targets))


class DynamicTokens(Classification):
    """DynamicViT's: cross-entropy, the shares of kept tokens and, with a teacher, distillation.

    The teacher is a dense model of the same architecture; the student follows its class logits, and
    its kept tokens (features after the last norm; LV-ViT: logits of the auxiliary head).
    """

    def __init__(self, *args: Any, teacher: nn.Module | None = None):
        super().__init__(*args)
        self.teacher: Any = teacher

    def to(self, device: torch.device) -> None:
        if self.teacher is not None:
            self.teacher.to(device)

    def outputs(self, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits, and what the teacher is compared by at each image token (B, N, ...)."""
        if isinstance(model, LVViT):
            return model.heads(x)
        return model.forward_head(x), x[:, model.num_prefix_tokens :]

    def __call__(self, images: Tensor, labels: Tensor, *_: Tensor) -> dict[str, Tensor]:
        images, targets = (images, labels) if self.mixup is None else self.mixup(images, labels)
        recipe = self.recipe
        x, decisions = self.model.forward_masked(images)
        ratio_loss = torch.stack(
            [
                (kept.float().mean(1) - share).square().mean()
                for kept, share in zip(decisions, self.model.kept_shares(), strict=True)
            ]
        ).mean()
        losses = dict(ratio_loss=ratio_loss)
        if self.teacher is None:
            class_loss = self.cross_entropy(self.model.forward_head(x), targets)
            return losses | dict(loss=class_loss + recipe.ratio_weight * ratio_loss)
        logits, features = self.outputs(self.model, x)
        with torch.no_grad():
            teacher_logits, teacher_features = self.outputs(
                self.teacher, self.teacher.forward_features(images)
            )
        if isinstance(self.model, LVViT):
            distance = divergence(features, teacher_features)
        else:
            distance = (features.float() - teacher_features.float()).square().mean(-1)
        class_distillation = divergence(logits, teacher_logits).mean()
        token_distillation = mean_where(distance, decisions[-1].detach())
        distillation = class_distillation + token_distillation
        loss = self.cross_entropy(logits, targets) + recipe.ratio_weight * ratio_loss
        return losses | dict(
            loss=loss + recipe.distill_weight * distillation,
            class_distillation=class_distillation,
            token_distillation=token_distillation,
        )


def dense_teacher(model: DynamicViT) -> VisionTransformer:
    """A frozen copy of a model that keeps every token."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    teacher.set_keep_rate(1.0)
    return teacher


def make_objective(
    model: Any,
    recipe: Recipe,
    num_classes: int,
    batch_size: int,
    teacher: nn.Module | None = None,
) -> Classification:
    """The objective of a model, given what there is to learn from."""
    common = (model, recipe, num_classes, batch_size)
    if isinstance(model, DynamicViT):
        return DynamicTokens(*common, teacher=teacher)
    return Classification(*common)
