"""The LightningModule: one classifier, trained by a recipe."""

import hashlib
import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from evit.data.batch import make_mixup
from evit.training.recipe import Recipe


def lr_at(step: int, total_steps: int, warmup_steps: int, recipe: Recipe) -> float:
    """Learning rate at an optimizer step: linear from warmup_lr to the peak, then half a cosine."""
    if step < warmup_steps:
        return recipe.warmup_lr + (recipe.peak_lr - recipe.warmup_lr) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return recipe.min_lr + (recipe.peak_lr - recipe.min_lr) * cosine


def mix_seed(*parts: int) -> int:
    """A 32-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


class Classifier(L.LightningModule):
    """A model and how it is trained.

    Logs train/loss and lr at steps; val/loss, val/top1 and val/top5 (percent, over the images of
    all processes) at evaluations.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        num_classes: int,
        local_batch_size: int,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.recipe, self.seed = model, recipe, seed
        self.mixup = make_mixup(
            num_classes,
            recipe.mixup,
            recipe.cutmix,
            recipe.mixup_switch_prob,
            recipe.label_smoothing,
            local_batch_size,
        )
        self.loss = MeanMetric()
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # Mixup and drop path draw from global generators: with a seed for each batch and process,
        # a run that is resumed draws as one that was not interrupted.
        seed = mix_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        L.seed_everything(seed, verbose=False)
        images, targets = batch if self.mixup is None else self.mixup(*batch)
        smoothing = self.recipe.label_smoothing if targets.ndim == 1 else 0.0
        loss = F.cross_entropy(self.model(images), targets, label_smoothing=smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.model(images).float()
        self.loss.update(F.cross_entropy(logits, labels), len(labels))
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.loss.compute())
        self.log("val/top1", 100 * self.top1.compute(), prog_bar=True)
        self.log("val/top5", 100 * self.top5.compute())
        for metric in (self.loss, self.top1, self.top5):
            metric.reset()

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        model: Any = self.model
        groups = param_groups_weight_decay(
            model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay()
        )
        optimizer = torch.optim.AdamW(groups, lr=1.0)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(total * recipe.warmup_epochs / recipe.epochs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_at(step, total, warmup, recipe)
        )
        return [optimizer], [dict(scheduler=scheduler, interval="step")]

    def on_train_batch_start(self, *_: Any) -> None:
        if self.current_epoch == self.recipe.epochs - 1:
            self.trainer.check_val_every_n_epoch = 1  # the last epoch is always evaluated

    def on_train_batch_end(self, *_: Any) -> None:
        scheduler: Any = self.lr_schedulers()
        self.log("lr", scheduler.get_last_lr()[0])
