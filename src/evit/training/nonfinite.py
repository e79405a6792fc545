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
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []  # of the batches accumulated for the next step
        self.steps: list[tuple[tuple[int, ...], str, Tensor]] = []  # since the last look

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        # Where the loss of this process is no number, its gradients are none, nor is their mean.
        factor = torch.ones_like(loss).masked_fill(~loss.detach().isfinite(), math.nan)
        loss.register_hook(lambda gradient: gradient * factor)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients)
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"])
        if len(self.losses) < trainer.accumulate_grad_batches:
            return
        rates = "/".join(f"{rate:.3g}" for rate in getattr(pl_module.model, "keep_rate", ()))
        epoch, step, first = trainer.current_epoch, trainer.global_step, args[-1] + 1
        text = f"(epoch {epoch + 1}/{trainer.max_epochs}, step {step}, learning rate {self.lr:.3g}"
        text += f", keep rate {rates})" if rates else ")"
        row = torch.stack([*self.losses, self.norm])
        self.steps.append(((epoch, first - len(self.losses)), text, row))
        self.losses = []
        if trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0:
            self.look(trainer)

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        self.look(trainer)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
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
        rows = torch.stack([row for _, _, row in steps])
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        bad = ~(rows[:, :-1] if scaled else rows).isfinite().all(1)
        bad = trainer.strategy.reduce(bad.int(), reduce_op="max")
        if bad.any():
            i = int(bad.nonzero()[0])
            place, text, row = steps[i]
            text = self.described(trainer, place, text, row.tolist())
            raise FloatingPointError(f"{text}. No checkpoint has seen this: {WAY_OUT}")

    def described(self, trainer: Any, place: Any, text: str, row: list[float]) -> str:
        """A step that is not finite, and its images in a process whose loss is not, if any."""
        (epoch, first), (*losses, norm) = place, row
        wrong = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        what = (
            f"the loss is {losses[wrong[0]]}" if wrong else f"the norm of the gradients is {norm}"
        )
        batches = [first + i for i in wrong or range(len(losses))]
        images = "; ".join(trainer.datamodule.describe_batch(epoch, batch) for batch in batches)
        text = f"{what} {text}, for images of process {trainer.global_rank}: {images}"
        found: list[Any] = [(not wrong, text)] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(found, found[trainer.global_rank])
        return min(found)[1]
