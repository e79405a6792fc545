"""Lightning's callbacks: keep rate, pictures, progress, average of the weights, checkpoints."""

import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from evit.data.batch import denormalize
from evit.data.folders import in_words
from evit.files import whole_file
from evit.models.weights import read_file
from evit.reducers import keep_rate_at
from evit.report.pictures import draw_kept


class KeepRateSchedule(L.Callback):
    """Lower the model's keep rate at every training step, from 1 to its final value; log it."""

    def __init__(self, shrink_start_epoch: int, shrink_epochs: int, token_multiple: int = 1):
        self.schedule, self.multiple = (shrink_start_epoch, shrink_epochs), token_multiple

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.model, reducer = pl_module.model, pl_module.model.reducer
        self.final: tuple[float, ...] = self.model.keep_rate
        if reducer.masked or reducer.own or reducer.given:
            self.schedule = (0, 0)  # constant, as these methods' authors train
        self.choices = sorted(pl_module.recipe.any_rate or ())[:-1]  # the largest teaches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
        steps = trainer.num_training_batches
        i -= i % trainer.accumulate_grad_batches  # one rate for a whole step
        rates = keep_rate_at(trainer.current_epoch * steps + i, steps, self.final, *self.schedule)
        if self.choices:  # every other time the smallest; a draw from seed and step alone
            drawn = random.Random(f"{pl_module.seed} {trainer.global_step}").choice(self.choices)
            rates = (drawn if trainer.global_step % 2 else self.choices[0],) * len(self.final)
        self.set(rates, 1 if rates == self.final or self.choices else self.multiple)
        tokens = self.model.tokens_per_block()
        pl_module.log("tokens_per_image", sum(tokens) / len(tokens), prog_bar=True)
        if len(set(self.final)) == 1:
            pl_module.log("keep_rate", rates[0], prog_bar=True)
        else:
            pl_module.log_dict({f"keep_rate/{i}": rate for i, rate in enumerate(rates, 1)})

    def on_validation_start(self, *_: Any) -> None:
        if self.choices:
            self.set(self.final, 1)

    def set(self, rates: tuple[float, ...], multiple: int) -> None:
        self.model.reducer.multiple = multiple
        if rates != self.model.keep_rate:
            self.model.set_keep_rate(rates)

    def on_train_end(self, *_: Any) -> None:
        self.set(self.final, 1)


class KeptPatches(L.Callback):
    """Draw the kept patches of images spread over the first process's, at each evaluation."""

    def __init__(self, path: Path, num_images: int = 8):
        self.path, self.num_images = path, num_images
        self.images: list[Any] = []  # and their labels

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        _, batch, i, *_ = args
        data, batches = trainer.datamodule, trainer.num_val_batches[0]
        step = max(1, batches * data.local_batch_size // self.num_images)
        some = (t[-i * data.local_batch_size % step :: step].clone() for t in batch)
        self.images = [*(self.images if i else []), *zip(*some, strict=True)]
        if i < batches - 1 or not trainer.is_global_zero:
            return
        images, labels = map(torch.stack, zip(*self.images[: self.num_images], strict=True))
        pixels, names = denormalize(images, data.mean, data.std), in_words(list(data.classes))
        picture = draw_kept(pl_module.model, images, pixels, names, [names[y] for y in labels])
        with whole_file(self.path) as file:
            picture.save(file, "png")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # W&B's; that of metrics.jsonl does nothing
                logger.log_image("kept_patches", picture, trainer.global_step)


class Progress(L.Callback):
    """Log training speed; print a line every 30 s (if there is no bar) and after evaluations."""

    def __init__(self, batch_size: int, bar: bool = False):
        self.batch_size, self.bar, self.epoch, self.numbers = batch_size, bar, -1, ""
        self.waiting = "in the first step"  # which may compile, until there is a line
        self.due = time.monotonic() + 8
        self.images_per_s: float | None = None  # until two steps of an epoch were taken

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        done, total = args[-1] + 1, trainer.num_training_batches
        now = (done, time.perf_counter(), trainer.train_dataloader.waited)
        if self.epoch != trainer.current_epoch:  # its first batch, which may compile, is left out
            self.epoch, self.start = trainer.current_epoch, now
        else:
            batches, seconds, waited = (b - a for a, b in zip(self.start, now, strict=True))
            images = batches * self.batch_size / trainer.accumulate_grad_batches
            self.images_per_s, self.data_wait = images / seconds, waited / seconds
            left = ((trainer.max_epochs - self.epoch) * total - done) * seconds / batches
            self.numbers = f"{self.images_per_s:.0f} images/s  data wait {self.data_wait:.0%}  "
            self.numbers += f"{timedelta(seconds=round(left))} left"
        names = ("train/loss", "keep_rate", "tokens_per_image")
        self.tell(trainer, f"step {done}/{total}", names, self.numbers)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.images_per_s is not None:
            pl_module.log("train/images_per_s", self.images_per_s, prog_bar=True)
            pl_module.log("train/data_wait", self.data_wait)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.tell(trainer, f"evaluating {args[2] + 1}/{sum(trainer.num_val_batches)}")

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self.tell(trainer, "", ("train/loss", "val/loss", "val/top1", "val/top5"))

    def tell(self, trainer: Any, what: str, names: Any = (), more: str = "") -> None:
        """Print a line with metrics if one is due; reading them waits for the GPU."""
        self.waiting = ""
        if not trainer.is_global_zero or (what and (self.bar or time.monotonic() < self.due)):
            return
        self.due = time.monotonic() + 30 if what else self.due
        epoch, values = min(trainer.current_epoch + 1, trainer.max_epochs), trainer.callback_metrics
        numbers = [f"{name} {float(values[name]):.3f}" for name in names if name in values]
        words = [f"epoch {epoch}/{trainer.max_epochs}", what, *numbers, more]
        print("  ".join(filter(None, words)), flush=True)


class EMA(WeightAveraging):
    """Moving average of the weights: evaluated and saved as "state_dict", or "ema_state_dict"."""

    def __init__(self, decay: float, evaluated: bool = True):
        super().__init__(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
        self.evaluated = evaluated
        if not evaluated:
            self._swap_models = self._copy_average_to_current = lambda *_: None  # type: ignore

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._average_model.to(pl_module.device)  # type: ignore[union-attr]  # it was on the CPU

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Any) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if not self.evaluated and "current_model_state" in checkpoint:
            checkpoint["ema_state_dict"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = checkpoint.pop("current_model_state")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Any) -> None:
        if average := checkpoint.get("ema_state_dict"):
            trained = checkpoint["state_dict"]
            checkpoint = checkpoint | dict(current_model_state=trained, state_dict=average)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)


class WholeFiles(TorchCheckpointIO):
    """Give a checkpoint its final name only when all of it is on the disk."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(Path(path)) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # its zip writer hides the error of the disk
                raise error.__context__ or error from None


class LastCheckpoint(Checkpoint):
    """Write last.ckpt every epoch and some steps, and epoch_010.ckpt every `keep` epochs."""

    def __init__(self, folder: Path, every_n_steps: int | None, keep: int | None):
        self.folder, self.every_n_steps, self.keep = folder, every_n_steps, keep
        self.next, self.last = folder / "next.ckpt", folder / "last.ckpt"

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:  # left by a process that was killed while writing
            for path in (*self.folder.glob("*.tmp"), *self.folder.glob("next.ckpt")):
                path.unlink()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        whole_step = (args[-1] + 1) % trainer.accumulate_grad_batches == 0
        due = self.every_n_steps and whole_step and trainer.global_step % self.every_n_steps == 0
        if due and not trainer.is_last_batch:  # the end of the epoch saves anyway
            trainer.save_checkpoint(self.next)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        epochs = trainer.current_epoch + 1
        if self.keep and epochs % self.keep == 0:
            trainer.save_checkpoint(self.folder / f"epoch_{epochs:03d}.ckpt")
        trainer.save_checkpoint(self.next)
        self.on_train_batch_start(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and self.next.is_file():
            if self.last.exists():
                self.last.replace(self.folder / "previous.ckpt")
            self.next.replace(self.last)  # only now does metrics.jsonl have its step, too


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint of best val/top1 among the epochs at the final keep rate."""

    def __init__(self, folder: Path, first_epoch: int):
        # Save after the evaluation, so that last.ckpt, written next, records it.
        more: Any = dict(enable_version_counter=False, save_on_train_epoch_end=False)
        super().__init__(folder, "best", monitor="val/top1", mode="max", **more)
        self.first_epoch = first_epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch >= self.first_epoch:
            super().on_validation_end(trainer, pl_module)


def optimizer_steps(path: Path) -> int:
    """Read the number of optimizer steps in a checkpoint; a ValueError if it cannot be read."""
    checkpoint = read_file(path, "meta")
    if not isinstance(checkpoint, dict) or "optimizer_states" not in checkpoint:
        raise ValueError(f"{path} holds weights alone: checkpoint={path} starts from them")
    return checkpoint["global_step"]


def unfinished(folder: Path) -> tuple[Path | None, int]:
    """Find the last readable checkpoint of an interrupted run, if there is one, and its steps."""
    names = ("last", "previous", "epoch_*")
    found = [sorted(folder.glob(f"checkpoints/{name}.ckpt"), reverse=True) for name in names]
    for path in sum(found, []):
        try:
            return path, optimizer_steps(path)
        except ValueError as error:
            rank_zero_warn(f"{error}: it is left out")
    if any(found):
        raise ValueError(f"no checkpoint in {folder} can be read: overwrite=true starts anew")
    return None, 0


def given(resume: str, folder: Path) -> tuple[Path | None, int]:
    """Return the checkpoint of resume=PATH and its steps; none for resume=auto."""
    if resume == "auto":
        return None, 0
    path = Path(resume).expanduser().resolve()
    if folder.resolve() in path.parents:
        raise ValueError(f"resume={resume} is a checkpoint of this very run: take resume=auto")
    return path, optimizer_steps(path)


@rank_zero_only
def require_unfinished(path: Path, seen: int, data: Any, epochs: int) -> None:
    steps = len(data.train_dataloader()) // data.trainer.accumulate_grad_batches * epochs
    if seen >= steps:
        has = f"has seen {seen} steps, and this run has {steps} in {epochs} epochs"
        raise ValueError(f"resume={path} {has}: raise recipe.epochs, or take checkpoint={path}")
