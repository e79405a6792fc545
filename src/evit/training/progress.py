"""How far training is, and how fast: a live display on a terminal, lines elsewhere."""

import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Throughput(L.Callback):
    """Images per second of training, over all processes, and the share of time spent waiting
    for data in this one; of each epoch, its first step left out."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.images_per_s: float | None = None  # until two steps of an epoch were taken
        self.data_wait: float | None = None
        self.epoch = -1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        now = (args[-1], time.perf_counter(), trainer.train_dataloader.waited)  # type: ignore
        if self.epoch != trainer.current_epoch:
            self.epoch, self.start = trainer.current_epoch, now
            return
        batches, seconds, waited = (b - a for a, b in zip(self.start, now, strict=True))
        self.images_per_s = batches * self.batch_size / trainer.accumulate_grad_batches / seconds
        self.data_wait = waited / seconds

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.images_per_s is not None and self.data_wait is not None:
            pl_module.log("train/images_per_s", self.images_per_s)
            pl_module.log("train/data_wait", self.data_wait)


class Progress(L.Callback):
    """Says in the first process how training goes: a line for each evaluation, and what `show`
    makes of the numbers in between, every `interval` seconds."""

    interval: float

    def __init__(self, throughput: Throughput):
        self.throughput = throughput
        self.steps = 0  # since the first step of this program
        self.shown = time.monotonic()

    def show(self, trainer: L.Trainer, batches: int) -> None:
        raise NotImplementedError

    def print(self, line: str) -> None:
        print(line, flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        now = time.monotonic()
        if self.steps == 0:
            self.start = now
        self.steps += 1
        if trainer.is_global_zero and now - self.shown >= self.interval:
            self.shown = now
            self.show(trainer, args[-1] + 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.shown = time.monotonic()
        if trainer.is_global_zero:
            values = numbers(trainer)
            names = ("train/loss", "val/loss", "val/top1", "val/top5")
            line = "  ".join(f"{name} {values[name]:.3f}" for name in names if name in values)
            epoch = min(trainer.current_epoch + 1, trainer.max_epochs or 0)
            self.print(f"epoch {epoch}/{trainer.max_epochs}  {line}")

    def speed(self, trainer: L.Trainer, batches: int) -> list[str]:
        """Images per second, the wait for data, and when training will be over."""
        found = []
        if self.throughput.images_per_s is not None and self.throughput.data_wait is not None:
            found.append(f"{self.throughput.images_per_s:.0f} images/s")
            found.append(f"data wait {100 * self.throughput.data_wait:.0f} %")
        if self.steps > 1:
            per_step = (time.monotonic() - self.start) / (self.steps - 1)  # with its evaluations
            epochs = int(trainer.max_epochs or 0) - trainer.current_epoch
            left = epochs * int(trainer.num_training_batches) - batches
            found.append(f"ETA {duration(left * per_step)}")
        return found

    def state(self, trainer: L.Trainer) -> list[str]:
        """The loss and what else says how the model is doing."""
        values = numbers(trainer)
        found = [f"loss {values['train/loss']:.3f}"] if "train/loss" in values else []
        if "val/top1" in values:
            found.append(f"top-1 {values['val/top1']:.2f} %")
        rates = [f"{value:.2f}" for name, value in values.items() if name.startswith("keep_rate")]
        if rates:
            found.append(f"keep rate {'/'.join(rates)}")
        if "tokens_per_image" in values:
            found.append(f"{values['tokens_per_image']:.0f} tokens/image")
        if trainer.strategy.root_device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(trainer.strategy.root_device)
            found.append(f"{peak / 2**30:.1f} GiB")
        return found


class Lines(Progress):
    """For logs: a line for each evaluation, and at least one a minute."""

    interval = 60.0

    def show(self, trainer: L.Trainer, batches: int) -> None:
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        step = f"step {batches}/{int(trainer.num_training_batches)}"
        self.print("  ".join([epoch, step, *self.state(trainer), *self.speed(trainer, batches)]))


class Display(Progress):
    """For terminals: a bar and the numbers, live; a line for each evaluation stays above."""

    interval = 0.25

    def __init__(self, throughput: Throughput):
        super().__init__(throughput)
        self.live: Live | None = None
        self.console = Console()

    def print(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.live = Live(console=self.console, transient=True, auto_refresh=False)
            self.live.start()

    def show(self, trainer: L.Trainer, batches: int) -> None:
        total = int(trainer.num_training_batches)
        self.draw(trainer, batches, total, self.speed(trainer, batches))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        now = time.monotonic()
        if trainer.is_global_zero and now - self.shown >= self.interval:
            self.shown = now
            self.draw(trainer, args[2] + 1, int(trainer.num_val_batches[0]), ["evaluating"])

    def draw(self, trainer: L.Trainer, done: int, total: int, texts: list[str]) -> None:
        if self.live is None:
            return
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_row(epoch, ProgressBar(total, done), f"{done}/{total}", *texts)
        state = Text("  ".join(self.state(trainer)), style="dim")
        self.live.update(Group(line, state), refresh=True)

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop()

    def on_exception(self, *_: Any) -> None:
        self.stop()


class EvaluationBar(RichProgressBar):
    """Lightning's, without the version number of the logger."""

    def __init__(self) -> None:
        theme = RichProgressBarTheme(progress_bar="cyan", progress_bar_finished="green")
        super().__init__(leave=True, theme=theme)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def progress(throughput: Throughput) -> Progress:
    """A live display on a terminal, lines elsewhere."""
    return Display(throughput) if sys.stdout.isatty() else Lines(throughput)


def numbers(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def duration(seconds: float) -> str:
    """In the two largest of its units: 1 d 3 h, 2 h 5 min, 3 min 20 s, 8 s."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    seconds = round(seconds)
    for (large, size), (small, part) in zip(units, units[1:], strict=False):
        if seconds >= size:
            rest = seconds % size // part
            return f"{seconds // size} {large}" + (f" {rest} {small}" if rest else "")
    return f"{seconds} s"
