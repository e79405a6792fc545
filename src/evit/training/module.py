"""The LightningModule: one classifier, trained by a recipe."""

import hashlib
import math
from typing import Any

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from evit.config import Recipe
from evit.data.batch import augment_batch
from evit.training.callbacks import WAY_OUT
from evit.training.losses import Classification
from evit.training.optimizer import make_optimizer


def mix_seed(*parts: int) -> int:
    """Hash numbers to a 32-bit seed; neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


class Classifier(L.LightningModule):
    """LightningModule that trains a model by a recipe; checkpoints store `knobs` under "evit".

    Logs train/loss and lr at steps, and val/loss, val/top1 and val/top5 (percent, over the images
    of all processes) at evaluations.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        num_classes: int,
        objective: Classification,
        seed: int = 0,
        knobs: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model, self.recipe, self.seed = model, recipe, seed
        self.objective, self.knobs = objective, knobs
        parameters = dict(model.named_parameters())
        apart = recipe.backbone_lr != 1 or recipe.backbone_frozen_epochs
        if apart and not any(name.startswith("reducer.") for name in parameters):
            raise ValueError(
                "recipe.backbone_lr and recipe.backbone_frozen_epochs are for a reducer that "
                "learns, as DynamicViT's: leave them at 1 and 0"
            )
        for name in recipe.frozen:
            if name not in parameters:
                kind = type(model).__name__
                raise ValueError(f"recipe.frozen names {name!r}, which {kind} does not have")
            parameters[name].requires_grad_(False)
        self.metrics: Any = nn.ModuleDict(
            dict(
                loss=MeanMetric(nan_strategy=math.nan),  # the default leaves NaN out of the mean
                top1=MulticlassAccuracy(num_classes, average="micro"),
                top5=MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        # Erasing, mixup and drop path use global generators. A seed per batch and process makes a
        # resumed run draw the same numbers as an uninterrupted one.
        seed = mix_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        L.seed_everything(seed, verbose=False)
        batch = augment_batch(*batch, random_erasing=self.recipe.random_erasing)
        losses = self.objective(*batch)
        trainer: Any = self.trainer
        every = trainer.log_every_n_steps if trainer.world_size > 1 else 0
        for name, value in losses.items():
            if every and (self.global_step + 1) % every == 0:
                value = trainer.strategy.reduce(value.detach().clone())  # the mean of all processes
            self.log(f"train/{name}", value, prog_bar=name == "loss")
        return losses["loss"]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        if not len(labels):
            return
        logits = self.model(images).float()
        self.metrics["loss"].update(F.cross_entropy(logits, labels), len(labels))
        for name in ("top1", "top5"):
            self.metrics[name].update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        for name, metric in self.metrics.items():
            value = metric.compute() * (1 if name == "loss" else 100)
            metric.reset()
            if not value.isfinite():
                raise FloatingPointError(
                    f"val/loss is {value} after epoch {self.current_epoch + 1}/"
                    f"{self.recipe.epochs}, {self.global_step} steps: the model has diverged: "
                    f"{WAY_OUT}"
                )
            self.log(f"val/{name}", value, prog_bar=name == "top1")

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        optimizer, scheduler = make_optimizer(self.model, self.recipe, int(steps))
        return [optimizer], [dict(scheduler=scheduler, interval="step")]

    def on_fit_start(self) -> None:
        if self.objective.teacher is not None:  # not a submodule, so not in checkpoints
            self.objective.teacher.to(self.device)

    def on_train_start(self) -> None:
        self.model.train(not self.recipe.train_in_eval_mode)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.current_epoch == self.recipe.epochs - 1:
            self.trainer.check_val_every_n_epoch = 1  # the last epoch is always evaluated
        scheduler: Any = self.lr_schedulers()  # which is at the next step when this one has ended
        self.log("lr", scheduler.get_last_lr()[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.knobs:
            checkpoint["evit"] = self.knobs
