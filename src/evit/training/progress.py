"""How far training is, and how fast: Lightning's bar on a terminal, lines elsewhere."""

import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar


class Throughput(L.Callback):
    """Images per second of training, over all processes, and the share of time spent waiting
    for data in this one; of each epoch, its first step left out."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.images_per_s: float | None = None  # until two steps of an epoch were taken
        self.data_wait, self.epoch = 0.0, -1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        now = (args[-1], time.perf_counter(), trainer.train_dataloader.waited)
        if self.epoch != trainer.current_epoch:
            self.epoch, self.start = trainer.current_epoch, now
            return
        batches, seconds, waited = (b - a for a, b in zip(self.start, now, strict=True))
        self.images_per_s = batches * self.batch_size / trainer.accumulate_grad_batches / seconds
        self.data_wait = waited / seconds

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.images_per_s is not None:
            pl_module.log("train/images_per_s", self.images_per_s)
            pl_module.log("train/data_wait", self.data_wait)

    def state(self, trainer: L.Trainer) -> dict[str, str]:
        """The numbers that say how training goes. Reads metrics, so that a GPU is waited for."""
        shown = {"train/loss": "loss {:.3f}", "val/top1": "top-1 {:.2f} %"}
        shown |= {"keep_rate": "keep rate {:.2f}", "tokens_per_image": "{:.0f} tokens/image"}
        values = trainer.callback_metrics
        found = {k: text.format(float(values[k])) for k, text in shown.items() if k in values}
        if self.images_per_s is not None:
            found["speed"] = f"{self.images_per_s:.0f} images/s"
            found["wait"] = f"data wait {100 * self.data_wait:.0f} %"
        if (device := trainer.strategy.root_device).type == "cuda":
            found["memory"] = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        return found


class Lines(L.Callback):
    """A line after each evaluation; with `steps` also one every 30 s, the first within 10 s."""

    def __init__(self, throughput: Throughput | None = None, steps: bool = True):
        self.throughput, self.steps = throughput, steps
        self.due = time.monotonic() + 8

    def tell(self, trainer: Any, what: str, done: int, total: float) -> None:
        if not self.steps or not trainer.is_global_zero or time.monotonic() < self.due:
            return
        self.due = time.monotonic() + 30
        words = [f"{what} {done}/{int(total)}"]
        if self.throughput:
            words.insert(0, f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")
            words += self.throughput.state(trainer).values()
            if speed := self.throughput.images_per_s:
                epochs = trainer.max_epochs - trainer.current_epoch
                batches = epochs * trainer.num_training_batches - done
                images = batches * self.throughput.batch_size / trainer.accumulate_grad_batches
                words.append(f"{timedelta(seconds=round(images / speed))} left")
        print("  ".join(words), flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.tell(trainer, "step", args[-1] + 1, trainer.num_training_batches)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.tell(trainer, "evaluating", args[2] + 1, sum(trainer.num_val_batches))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and self.throughput:
            values = trainer.callback_metrics
            epoch = min(trainer.current_epoch + 1, trainer.max_epochs)
            words = [f"epoch {epoch}/{trainer.max_epochs}"]
            for name in ("train/loss", "val/loss", "val/top1", "val/top5"):
                words += [f"{name} {float(values[name]):.3f}"] if name in values else []
            print("  ".join(words), flush=True)


class Bar(RichProgressBar):
    """Lightning's bar, with the state of training read once a second."""

    def __init__(self, throughput: Throughput | None = None):
        super().__init__(leave=throughput is None)
        self.throughput, self.read_at = throughput, 0.0
        self.texts: dict[str, Any] = {}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        if self.throughput and time.monotonic() > self.read_at + 1:
            self.read_at, self.texts = time.monotonic(), dict(self.throughput.state(trainer))
        return self.texts


def progress(throughput: Throughput | None = None) -> list[L.Callback]:
    """A bar on a terminal, and lines for evaluations; elsewhere lines alone."""
    bar: list[L.Callback] = [Bar(throughput)] if sys.stdout.isatty() else []
    return [*bar, Lines(throughput, steps=not bar)]
