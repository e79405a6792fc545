"""What happens beside the training loop."""

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torchvision.io import write_png

from evit.data.batch import denormalize
from evit.models.vit import EViT
from evit.report.pictures import draw_kept
from evit.schedule import at_multiples, keep_rate_at


class KeepRateSchedule(L.Callback):
    """Moves the model's keep rate to its final value during training, at every step.

    Logs keep_rate (keep_rate/1, /2, ... where the reorganizations differ) and tokens_per_image:
    the image tokens that a block's MLP sees, averaged over the blocks. While the keep rate moves,
    an image's tokens are rounded up to multiples of token_multiple.
    """

    def __init__(
        self, model: EViT, shrink_start_epoch: int, shrink_epochs: int, token_multiple: int = 1
    ):
        self.model, self.final, self.multiple = model, model.keep_rate, token_multiple
        self.schedule = (shrink_start_epoch, shrink_epochs)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        steps = int(trainer.num_training_batches)
        step = trainer.current_epoch * steps + batch_idx
        rates = keep_rate_at(step, steps, self.final, *self.schedule)
        actual = rates
        if self.multiple > 1 and rates != self.final:
            model, patches = self.model, self.model.patch_embed.num_patches
            others = (model.num_prefix_tokens, model.fusion)
            actual = at_multiples(rates, patches, *others, self.multiple)
        self.model.set_keep_rate(actual)
        tokens = self.model.tokens_per_block()
        pl_module.log("tokens_per_image", sum(tokens) / len(tokens))
        if len(set(self.final)) == 1:
            pl_module.log("keep_rate", rates[0], prog_bar=True)
        else:
            pl_module.log_dict({f"keep_rate/{i}": rate for i, rate in enumerate(rates, 1)})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.model.set_keep_rate(self.final)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights of the best val/top1, among the epochs at the final keep rate."""

    def __init__(self, folder: Path, first_epoch: int):
        super().__init__(
            folder, "best", monitor="val/top1", mode="max", enable_version_counter=False
        )
        self.first_epoch = first_epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch >= self.first_epoch:
            super().on_validation_end(trainer, pl_module)


class Throughput(L.Callback):
    """Images per second of training, over all processes, each epoch's first step left out."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.images_per_s: float | None = None  # until an epoch of two steps or more has ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        batch_idx = args[-1]
        if batch_idx == 0:
            self.start = time.perf_counter()
        elif trainer.is_last_batch:
            images = batch_idx * self.batch_size / trainer.accumulate_grad_batches
            self.images_per_s = images / (time.perf_counter() - self.start)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.images_per_s is not None:
            pl_module.log("train/images_per_s", self.images_per_s)


class KeptPatches(L.Callback):
    """Draws, at the end of training, which patches of some validation images survive.

    The images are spread evenly over those of the first process.
    """

    def __init__(self, model: EViT, path: Path, num_images: int = 8):
        self.model, self.path, self.num_images = model, path, num_images
        self.images: list[Tensor] = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        batch_size = trainer.datamodule.local_batch_size  # type: ignore[attr-defined]
        step = max(1, int(trainer.num_val_batches[0]) * batch_size // self.num_images)
        first = -batch_idx * batch_size % step
        wanted = self.num_images - len(self.images)
        self.images += batch[0][first::step][:wanted].clone()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not self.images:
            return
        images = torch.stack(self.images)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        picture = draw_kept(self.model, images, denormalize(images, data.mean, data.std))
        write_png(picture, str(self.path))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("kept_patches", [str(self.path)])


class EpochLines(L.Callback):
    """One line for each evaluation, where there is no terminal for a progress bar."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            names = ("train/loss", "val/loss", "val/top1", "val/top5")
            line = "  ".join(f"{name} {values[name]:.3f}" for name in names if name in values)
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {line}", flush=True)


class ProgressBar(RichProgressBar):
    """Lightning's, without the version number of the logger."""

    def __init__(self) -> None:
        theme = RichProgressBarTheme(progress_bar="cyan", progress_bar_finished="green")
        super().__init__(leave=True, theme=theme)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def progress() -> L.Callback:
    """A live progress bar on a terminal, lines elsewhere."""
    return ProgressBar() if sys.stdout.isatty() else EpochLines()
