"""Losses and gradients that are not finite: of which step, and what becomes of it."""

import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

MAX_IN_A_ROW = 10  # steps that recipe.on_nonfinite_loss=skip leaves out before it stops, too


@dataclass
class Step:
    """One optimizer step of this process, as it is remembered until it is looked at."""

    number: int
    epoch: int
    lr: float
    keep_rate: tuple[float, ...]
    first_batch: int  # of those accumulated, counted in the epoch
    losses: list[Tensor]
    grad_norm: Tensor  # of all processes' gradients together


class NonFinite(L.Callback):
    """Ends a run in which the loss or the gradients of a step are not finite, naming the step; or,
    with `skip`, leaves that step out.

    To look at a loss, a GPU's processor waits for it. So the losses of all steps are kept on the
    device, and looked at whenever metrics are logged, before an evaluation, and before a checkpoint
    is written: no checkpoint has seen such a step. A step that is left out changes neither weights
    nor optimizer; this is decided on the device, by PyTorch's fused AdamW. It is a step of the
    schedules all the same.

    A process whose loss is not finite makes its gradients so, and hence those of all processes. In
    float16, gradients that overflow are GradScaler's, and losses alone are looked at.

    Raises:
        FloatingPointError: in every process, with the same message.
    """

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.skipped = self.in_a_row = 0
        self.losses: list[Tensor] = []  # of the step under way
        self.steps: list[Step] = []  # that nobody has looked at

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        factor = torch.ones_like(loss).masked_fill(~loss.detach().isfinite(), math.nan)
        loss.register_hook(lambda gradient: gradient * factor)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        self.lr = optimizer.param_groups[0]["lr"]
        if self.skip:
            optimizer.found_inf = (~self.grad_norm.isfinite()).float()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.losses.append(outputs["loss"])
        if len(self.losses) == trainer.accumulate_grad_batches:
            number, model = trainer.global_step, pl_module.model
            keep_rate = tuple(getattr(model, "keep_rate", ()))  # type: ignore[arg-type]
            first = batch_idx + 1 - len(self.losses)
            place = (number, trainer.current_epoch, self.lr, keep_rate, first)
            self.steps.append(Step(*place, self.losses, self.grad_norm))
            self.losses = []
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every and number % every == 0:
                self.look(trainer)
        if self.skip:
            # Filled on the device: a number would be copied there, and waited for.
            skipped = torch.full((), float(self.skipped), device=pl_module.device)
            pl_module.log("train/skipped_steps", skipped)

    def on_train_start(self, *_: Any) -> None:
        self.losses.clear()
        self.steps.clear()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.look(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()
        if not trainer.is_global_zero:
            return
        weights = {k: v for k, v in pl_module.state_dict().items() if v.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in weights.values()])
        for name, good in zip(weights, finite.tolist(), strict=True):
            if not good:
                raise FloatingPointError(
                    f"after {trainer.global_step} steps {name} is not finite. {NOT_SAVED}"
                )

    def state_dict(self) -> dict[str, int]:
        return dict(skipped=self.skipped, in_a_row=self.in_a_row)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def look(self, trainer: L.Trainer) -> None:
        """Look at the steps since the last time. All processes do this at the same step."""
        steps, self.steps = self.steps, []
        if not steps:
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        found = torch.stack([x for step in steps for x in (*step.losses, step.grad_norm)])
        rows = found.view(len(steps), -1)
        bad = ~(rows[:, :-1] if scaled else rows).isfinite().all(1)
        bad = trainer.strategy.reduce(bad.int(), reduce_op="max")  # type: ignore[assignment]
        for step, row, wrong in zip(steps, rows.tolist(), bad.tolist(), strict=True):
            self.in_a_row = self.in_a_row + 1 if wrong else 0
            if wrong:
                text = describe(trainer, step, row)
                if not self.skip:
                    raise FloatingPointError(f"{text}. {NOT_SAVED}")
                self.skipped += 1
                if trainer.is_global_zero:
                    print(f"{text}. That step is left out, {self.skipped} so far", flush=True)
                if self.in_a_row >= MAX_IN_A_ROW:
                    raise FloatingPointError(f"{text}: {MAX_IN_A_ROW} steps in a row. {NOT_SAVED}")


WAYS_OUT = (
    "with resume=RUN/checkpoints/last.ckpt go on from before it at a lower recipe.lr, with "
    "recipe.clip_grad=1, or with recipe.on_nonfinite_loss=skip, which leaves out such steps"
)
NOT_SAVED = f"No checkpoint has seen this: {WAYS_OUT}"


def describe(trainer: L.Trainer, step: Step, row: list[float]) -> str:
    """A step that is not finite, and the images of the processes whose loss is; else of all.

    Args:
        row: the losses of its batches in this process, and the norm of all gradients.
    """
    losses = [loss * trainer.accumulate_grad_batches for loss in row[:-1]]
    wrong = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    batches = wrong or range(len(losses))
    images = "; ".join(data.describe_batch(step.epoch, step.first_batch + i) for i in batches)
    own = [losses[i] for i in wrong], f"of process {trainer.global_rank}: {images}"
    found: list[Any] = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(found, own)
    values = [loss for losses, _ in found for loss in losses]
    what = f"the loss is {values[0]}" if values else f"the norm of the gradients is {row[-1]}"
    place = f"epoch {step.epoch + 1}/{trainer.max_epochs}, step {step.number}"
    place += f", learning rate {step.lr:.3g}"
    if step.keep_rate:
        place += f", keep rate {'/'.join(f'{rate:.3g}' for rate in step.keep_rate)}"
    blamed = " and ".join(text for losses, text in found if losses or not values)
    return f"{what} ({place}), for images {blamed}"
