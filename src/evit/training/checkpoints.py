"""Write checkpoints atomically, and choose the one that a run resumes from."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from evit.files import whole_file
from evit.models.weights import read_file


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


def unfinished(folder: Path) -> Path | None:
    """Find the last readable checkpoint of an interrupted run, or None if there is none."""
    kept = sorted(folder.glob("checkpoints/epoch_*.ckpt"), reverse=True)
    newest = [folder / "checkpoints/last.ckpt", folder / "checkpoints/previous.ckpt"]
    found = [path for path in newest + kept if path.is_file()]
    for path in found:
        try:
            optimizer_steps(path)
            return path
        except ValueError as error:
            rank_zero_warn(f"{error}: it is left out")
    if found:
        raise ValueError(f"no checkpoint in {folder} can be read: overwrite=true starts anew")
    return None


def given(resume: str, folder: Path) -> Path | None:
    """Return the checkpoint of resume=PATH; None for resume=auto."""
    if resume == "auto":
        return None
    path = Path(resume).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"resume={resume} is neither auto nor a checkpoint")
    if folder.resolve() in path.parents:
        raise ValueError(f"resume={resume} is a checkpoint of this very run: take resume=auto")
    optimizer_steps(path)
    return path


def require_unfinished(path: Path, data: Any, epochs: int) -> None:
    """Raise a ValueError if a checkpoint has already seen all epochs of this run's data."""
    seen = optimizer_steps(path)
    steps = len(data.train_dataloader()) // data.trainer.accumulate_grad_batches * epochs
    if seen >= steps:
        has = f"has seen {seen} steps, and this run has {steps} in {epochs} epochs"
        raise ValueError(f"resume={path} {has}: raise recipe.epochs, or take checkpoint={path}")
