"""The LightningModule of evaluations: many settings of one model, in one pass over the data."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from evit.models import DynamicViT, EViT
from evit.training.module import mix_seed


@dataclass(frozen=True)
class Setting:
    """How many tokens a model keeps, which of them, and what becomes of the others.

    fusion and selection are None where they make no difference: every token is kept, or the model
    has no such choice.
    """

    keep_rate: tuple[float, ...]
    fusion: bool | None = None
    selection: str | None = None

    @property
    def dense(self) -> bool:
        return all(rate == 1 for rate in self.keep_rate)

    def apply(self, model: nn.Module) -> None:
        """Make a model compute so from its next forward on."""
        if isinstance(model, EViT):
            model.set_keep_rate(self.keep_rate)
        if self.fusion is not None:
            model.fusion = self.fusion  # type: ignore[assignment]
        if self.selection is not None:
            model.selection = self.selection  # type: ignore[assignment]


class Evaluator(L.LightningModule):
    """Top-1, top-5 (percent) and loss of a model at each of some settings.

    What all settings have in common is computed once: the batch itself, its embedding, and the
    blocks before the first reorganization. `results` then has, for each setting, dict(top1, top5,
    loss, images), over the images of all processes.

    Random selections draw from a seed of their own for each batch, process and setting: they do
    not depend on what else is evaluated.

    Args:
        shared: False lets every setting compute all by itself, which gives the same numbers. A
            model with a forward of its own always does.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: list[Setting],
        num_classes: int,
        seed: int = 0,
        shared: bool = True,
    ):
        super().__init__()
        self.model, self.settings, self.seed = model, settings, seed
        self.shared = shared and can_share(model)
        self.images = SumMetric()
        self.metrics: Any = nn.ModuleList(accuracy(num_classes) for _ in settings)
        self.results: list[dict[str, Any]] = []

    def logits(self, images: Tensor, batch_idx: int) -> Iterator[Tensor]:
        """The logits (B, num_classes) of images (B, 3, H, W) at each setting."""
        model: Any = self.model
        if self.shared:
            first = min(model.drop_loc, default=len(model.blocks))
            x, _, _ = model.encode(model.embed(images), stop=first)
        for setting in self.settings:
            setting.apply(model)
            name = zlib.crc32(repr(setting).encode())
            torch.manual_seed(mix_seed(self.seed, batch_idx, self.global_rank, name))
            if self.shared:
                yield model.classify(x, start=first)[0]
            else:
                yield model(images)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        if not len(labels):
            return
        self.images.update(len(labels))
        for metric, logits in zip(self.metrics, self.logits(images, batch_idx), strict=True):
            logits = logits.float()
            metric["loss"].update(F.cross_entropy(logits, labels), len(labels))
            metric["top1"].update(logits, labels)
            metric["top5"].update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        images = int(self.images.compute())
        self.results = [
            dict(
                top1=float(100 * metric["top1"].compute()),
                top5=float(100 * metric["top5"].compute()),
                loss=float(metric["loss"].compute()),
                images=images,
            )
            for metric in self.metrics
        ]
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()
        for setting, result in zip(self.settings, self.results, strict=True):
            if not math.isfinite(result["loss"]):
                rates = "/".join(f"{rate:g}" for rate in setting.keep_rate)
                raise FloatingPointError(
                    f"the loss is {result['loss']} at keep_rate {rates}: the checkpoint is of a "
                    f"model that has diverged, or precision {self.trainer.precision} is too low"
                )


def accuracy(num_classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        dict(
            loss=MeanMetric(nan_strategy=math.nan),  # the default leaves NaN out of the mean
            top1=MulticlassAccuracy(num_classes, average="micro"),
            top5=MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
        )
    )


def can_share(model: nn.Module) -> bool:
    """Whether embed, encode, norm and forward_head one after the other are the model's forward."""
    kind: Any = type(model)
    return (
        isinstance(model, EViT)
        and kind.forward in (EViT.forward, DynamicViT.forward)  # which differ in training alone
        and kind.forward_features is EViT.forward_features
    )


def has_choices(model: nn.Module) -> bool:
    """Whether a model reads `fusion` and `selection`: EViT's reorganizing_block alone does."""
    return getattr(type(model), "reorganizing_block", None) is EViT.reorganizing_block
