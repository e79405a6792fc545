"""What a training batch is charged, for each kind of model."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evit.data.batch import make_mixup, mix_token_box
from evit.data.label_maps import token_targets
from evit.models import DynamicViT, LVViT
from evit.recipe import Recipe


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with distributions as targets, (..., K) both, to (...)."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1)


def divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of logits (..., K), to (...)."""
    student, teacher = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def mean_where(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of the values whose weight is 1; zero if none is."""
    return (values * weight).sum() / weight.sum().clamp(1)


class Classification:
    """Cross-entropy of mixed images with smoothed labels.

    Called with a batch (images, labels), returns the loss under "loss", and its parts: what is
    drawn or looked up is prepared, and from there on a pure computation, losses(), follows.
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
            recipe.mixup_mode,
        )

    def to(self, device: torch.device) -> None:
        """Move what is not the trained model's."""

    def compile(self, **options: Any) -> None:
        """torch.compile losses(): one graph for each combination of token counts."""
        compiled: Any = torch.compile(self.losses, fullgraph=True, dynamic=False, **options)
        self.losses = compiled  # type: ignore[method-assign]

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.recipe.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def __call__(self, images: Tensor, labels: Tensor, *_: Tensor) -> dict[str, Tensor]:
        return self.losses(
            *((images, labels) if self.mixup is None else self.mixup(images, labels))
        )

    def losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
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

    def losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        recipe = self.recipe
        x, decisions = self.model.forward_masked(images)
        ratio_loss = torch.stack(
            [
                (kept.float().mean(1) - share).square().mean()
                for kept, share in zip(decisions, self.model.kept_shares(), strict=True)
            ]
        ).mean()
        if self.teacher is None:
            class_loss = self.cross_entropy(self.model.forward_head(x), targets)
            return dict(loss=class_loss + recipe.ratio_weight * ratio_loss, ratio_loss=ratio_loss)
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
        return dict(
            loss=loss + recipe.distill_weight * distillation,
            ratio_loss=ratio_loss,
            class_distillation=class_distillation,
            token_distillation=token_distillation,
        )


class TokenLabels(Classification):
    """LV-ViT's token labelling with MixToken, for batches (images, labels, label maps, crops), and
    RandAugment's maps where it is on.

    The class token learns the label of the crop, every surviving patch its own; a fused token has
    none. Each patch takes the label of the image that it came from before it was mixed.
    """

    def __init__(self, model: Any, recipe: Recipe, num_classes: int, batch_size: int):
        if recipe.mixup or recipe.cutmix:
            raise ValueError(
                "token labels go with MixToken, not with mixup and cutmix: take recipe=lvvit, or "
                "recipe.mixup=0 recipe.cutmix=0; or data.label_maps=null trains without them"
            )
        super().__init__(model, recipe, num_classes, batch_size)

    def __call__(  # type: ignore[override]
        self,
        images: Tensor,
        labels: Tensor,
        maps: Tensor,
        crops: Tensor,
        warps: Tensor | None = None,
    ) -> dict[str, Tensor]:
        grid = self.model.patch_embed.grid_size
        class_targets, targets = token_targets(
            maps, crops, self.num_classes, grid, self.recipe.label_smoothing, warps
        )
        swapped = mix_token_box(grid).to(images.device).flatten()
        share = swapped.float().mean()
        class_targets = (1 - share) * class_targets + share * class_targets.flip(0)
        targets = torch.where(swapped[:, None], targets.flip(0), targets)
        return self.losses(images, class_targets, targets, swapped)

    def losses(  # type: ignore[override]
        self, images: Tensor, class_targets: Tensor, targets: Tensor, swapped: Tensor
    ) -> dict[str, Tensor]:
        model = self.model
        x = model.embed(images, swapped)
        x, ids, _ = model.encode(x, model.patch_ids(x))
        class_logits, token_logits = model.heads(model.norm(x))
        index = ids.clamp(0)[:, :, None].expand(-1, -1, self.num_classes)
        token_loss = mean_where(
            soft_cross_entropy(token_logits, targets.gather(1, index)), (ids >= 0).float()
        )
        class_loss = soft_cross_entropy(class_logits, class_targets).mean()
        return dict(
            loss=class_loss + self.recipe.token_label_weight * token_loss,
            class_loss=class_loss,
            token_loss=token_loss,
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
    label_maps: bool = False,
    teacher: nn.Module | None = None,
) -> Classification:
    """The objective of a model, given what there is to learn from."""
    common = (model, recipe, num_classes, batch_size)
    if isinstance(model, DynamicViT):
        return DynamicTokens(*common, teacher=teacher)
    if isinstance(model, LVViT) and label_maps:
        return TokenLabels(*common)
    return Classification(*common)
