"""What a training batch is charged, for each kind of model."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit.data.batch import make_mixup, mix_token_box
from evit.data.label_maps import token_targets
from evit.recipe import Recipe


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with distributions as targets, (..., K) both, to (...)."""
    return -(targets * logits.float().log_softmax(-1)).sum(-1)


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
    """The losses of a reducer that trains in a way of its own (Reducer.losses).

    Args:
        teacher: the dense model that it is distilled from, if there is one.
    """

    def __init__(self, *args: Any, teacher: nn.Module | None = None):
        super().__init__(*args)
        self.teacher: Any = teacher

    def to(self, device: torch.device) -> None:
        if self.teacher is not None:
            self.teacher.to(device)

    def losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        model, common = self.model, (self.cross_entropy, self.teacher, self.recipe)
        return model.reducer.losses(model, images, targets, *common)


class TokenLabels(Classification):
    """LV-ViT's token labelling with MixToken, for batches (images, labels, label maps, crops), and
    RandAugment's maps where it is on.

    The class token learns the label of the crop, every surviving token that of its own patch; a
    fused token has none, a merged one that of the token it continues. Each patch takes the label
    of the image that it came from before it was mixed.
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
        ids = model.patch_ids(x)
        x, reductions = model.encode(x)
        for reduction in reductions:
            ids = reduction.ids(ids)
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


def dense_teacher(model: Any) -> Any:
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
    """The objective of a model: its reducer's own, token labels if it has a head for them and there
    are label maps, or plain classification."""
    common = (model, recipe, num_classes, batch_size)
    if getattr(getattr(model, "reducer", None), "masked", False):
        return DynamicTokens(*common, teacher=teacher)
    if hasattr(model, "heads") and label_maps:
        return TokenLabels(*common)
    return Classification(*common)
