"""Losses and gradients that are not finite stop a run, named by their step, before it is saved."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

WAY_OUT = (
    "with resume=RUN/checkpoints/last.ckpt go on from before it at a lower recipe.lr, or with "
    "recipe.clip_grad=1"
)


class NonFinite(L.Callback):
    """Stops a run in which the loss or the norm of the gradients of a step is not finite.

    Reading a loss makes the host wait for the GPU, so all stay on the device until metrics are
    logged, an evaluation begins or a checkpoint is written: no checkpoint has seen such a step. In
    float16 GradScaler deals with gradients that overflow, and only losses count.

    Raises:
        FloatingPointError: names the step and its images, the same in all processes.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []  # of the batches accumulated for the next step
        self.steps: list[tuple[tuple[Any, ...], Tensor]] = []  # since the last look

    def on_train_start(self, *_: Any) -> None:
        self.losses, self.steps = [], []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        # Where the loss of this process is no number, its gradients are none, nor is their mean.
        factor = torch.ones_like(loss).masked_fill(~loss.detach().isfinite(), math.nan)
        loss.register_hook(lambda gradient: gradient * factor)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"])
        if len(self.losses) < trainer.accumulate_grad_batches:
            return
        rates = tuple(getattr(pl_module.model, "keep_rate", ()))
        first = batch_idx + 1 - len(self.losses)
        place = (trainer.global_step, trainer.current_epoch, first, self.lr, rates)
        self.steps.append((place, torch.stack([*self.losses, self.norm])))
        self.losses = []
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            self.look(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.look(trainer)
        for name, value in pl_module.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                text = f"after {trainer.global_step} steps {name} is not finite"
                raise FloatingPointError(f"{text}. No checkpoint has seen this: {WAY_OUT}")

    def look(self, trainer: Any) -> None:
        """Look at the steps since the last time; all processes do this at the same step."""
        steps, self.steps = self.steps, []
        if not steps:
            return
        rows = torch.stack([row for _, row in steps])
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        bad = ~(rows[:, :-1] if scaled else rows).isfinite().all(1)
        bad = trainer.strategy.reduce(bad.int(), reduce_op="max")
        for (place, _), row, wrong in zip(steps, rows.tolist(), bad.tolist(), strict=True):
            if wrong:
                text = described(trainer, place, row)
                raise FloatingPointError(f"{text}. No checkpoint has seen this: {WAY_OUT}")


def described(trainer: Any, place: tuple[Any, ...], row: list[float]) -> str:
    """A step that is not finite, and its images in a process whose loss is not, if one's is."""
    number, epoch, first, lr, rates = place
    losses = [loss * trainer.accumulate_grad_batches for loss in row[:-1]]
    wrong = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    text = f"the loss is {losses[wrong[0]]}" if wrong else f"the norm of the gradients is {row[-1]}"
    text += f" (epoch {epoch + 1}/{trainer.max_epochs}, step {number}, learning rate {lr:.3g}"
    text += f", keep rate {'/'.join(f'{rate:.3g}' for rate in rates)})" if rates else ")"
    batches = [first + i for i in wrong or range(len(losses))]
    images = "; ".join(trainer.datamodule.describe_batch(epoch, batch) for batch in batches)
    found: list[Any] = [
        (not wrong, f"{text}, for images of process {trainer.global_rank}: {images}")
    ]
    if trainer.world_size > 1:
        found = found * trainer.world_size
        torch.distributed.all_gather_object(found, found[trainer.global_rank])
    return min(found)[1]
