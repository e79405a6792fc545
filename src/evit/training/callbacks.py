"""What happens beside the training loop."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from evit.data.batch import denormalize
from evit.files import whole_file
from evit.measure import speed
from evit.reducers.schedule import keep_rate_at
from evit.report.pictures import draw_kept
from evit.tracking import Tracker


class KeepRateSchedule(L.Callback):
    """Moves the model's keep rate to its final value during training, at every step.

    Logs keep_rate (keep_rate/1, /2, ... where the reorganizations differ) and tokens_per_image:
    the image tokens that a block's MLP sees, averaged over the blocks. While the keep rate moves,
    an image's tokens are rounded up to multiples of token_multiple.
    """

    def __init__(self, shrink_start_epoch: int, shrink_epochs: int, token_multiple: int = 1):
        self.schedule, self.multiple = (shrink_start_epoch, shrink_epochs), token_multiple

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        model: Any = pl_module.model
        self.model = model
        self.final: tuple[float, ...] = model.keep_rate
        reducer = model.reducer
        if reducer.masked or reducer.own or reducer.given:
            self.schedule = (0, 0)  # as its authors train it

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        steps = int(trainer.num_training_batches)
        batch_idx -= batch_idx % trainer.accumulate_grad_batches  # one rate for a whole step
        step = trainer.current_epoch * steps + batch_idx
        rates = keep_rate_at(step, steps, self.final, *self.schedule)
        self.model.reducer.multiple = 1 if rates == self.final else self.multiple
        if rates != self.model.keep_rate:
            self.model.set_keep_rate(rates)
        tokens = self.model.tokens_per_block()
        pl_module.log("tokens_per_image", sum(tokens) / len(tokens))
        if len(set(self.final)) == 1:
            pl_module.log("keep_rate", rates[0])
        else:
            pl_module.log_dict({f"keep_rate/{i}": rate for i, rate in enumerate(rates, 1)})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.model.reducer.multiple = 1
        if self.final != self.model.keep_rate:
            self.model.set_keep_rate(self.final)


class KeptPatches(L.Callback):
    """Draws which patches of some validation images survive, at each evaluation, as evaluated.

    The images are spread evenly over those of the first process. The file has the last picture,
    W&B some `logged` of them, from the first to the last.
    """

    def __init__(self, path: Path, num_images: int = 8, logged: int = 20):
        self.path = path
        self.num_images, self.logged = num_images, logged
        self.images: list[Tensor] = []
        self.next_logged = 0.0  # epochs

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.images.clear()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero:
            return
        batch_size = trainer.datamodule.local_batch_size  # type: ignore[attr-defined]
        step = max(1, int(trainer.num_val_batches[0]) * batch_size // self.num_images)
        first = -batch_idx * batch_size % step
        wanted = self.num_images - len(self.images)
        self.images += batch[0][first::step][:wanted].clone()
        if batch_idx == trainer.num_val_batches[0] - 1:  # before an EMA gives its place back
            self.draw(trainer, pl_module.model)

    def draw(self, trainer: L.Trainer, model: Any) -> None:
        images = torch.stack(self.images)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        picture = draw_kept(model, images, denormalize(images, data.mean, data.std))
        with whole_file(self.path) as file:
            picture.save(file, "png")
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs
        assert epochs
        if epoch < min(self.next_logged, epochs):
            return
        self.next_logged = (epoch * self.logged // epochs + 1) * epochs / self.logged
        for logger in trainer.loggers:
            if isinstance(logger, Tracker):
                logger.log_image("kept_patches", picture, trainer.global_step)


class InferenceSpeed(L.Callback):
    """Images per second of inference, measured for a moment at the end of training.

    Of one process, in the run's precision, not compiled, without reading images; in the batches of
    src/benchmark.py: 128 images on an accelerator, 8 on a CPU.
    """

    images_per_s: float | None = None

    @torch.no_grad()
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        device = pl_module.device
        batch_size = 8 if device.type == "cpu" else 128
        size = trainer.datamodule.img_size  # type: ignore[attr-defined]
        images = torch.rand(batch_size, 3, size, size, device=device)
        step = partial(pl_module.model.eval().forward, images)  # type: ignore[union-attr]
        with trainer.precision_plugin.forward_context():
            calls = speed.warm_up(step, 0.2, device)
            self.images_per_s = calls * batch_size / speed.timed(step, calls, device)
