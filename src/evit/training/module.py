"""The LightningModules: Classifier is trained by a recipe, Evaluator compares reducers."""

import hashlib
import math
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from evit import reducers
from evit.config import Recipe
from evit.data.batch import augment_batch
from evit.reducers import Reducer
from evit.reducers.dynamicvit import divergence
from evit.training.callbacks import WAY_OUT
from evit.training.losses import Classification


def mix_seed(*parts: int) -> int:
    """Hash numbers to a 32-bit seed; neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def lr_at(epoch: float, recipe: Recipe) -> float:
    """Learning rate at a (fractional) epoch: linear warm-up to the peak, then half a cosine.

    recipe.lr_schedule:
        plain: changes at every step; the cosine starts at the peak, after the warm-up.
        timm: constant within an epoch. The cosine spans all epochs except the cooldown, and the
            warm-up replaces its beginning (timm's train.py, LV-ViT).
        deit: as timm, one epoch late: DeiT's and EViT's loops step the scheduler after an epoch
            with that epoch's number, so the first two epochs run at warmup_lr.
    """
    start: float = recipe.warmup_epochs
    if recipe.lr_schedule != "plain":
        start, epoch = 0, math.floor(epoch)
        if recipe.lr_schedule == "deit":
            epoch = max(epoch - 1, 0)
    if epoch < recipe.warmup_epochs:
        share = epoch / recipe.warmup_epochs
        return recipe.warmup_lr + (recipe.peak_lr - recipe.warmup_lr) * share
    progress = min(1.0, (epoch - start) / (recipe.epochs - recipe.cooldown_epochs - start))
    return recipe.min_lr + (recipe.peak_lr - recipe.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(
    model: Any, recipe: Recipe, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Make AdamW and its schedule over total_steps; biases, norms and embeddings do not decay.

    The parameters of a reducer use recipe.lr; the backbone of such a model uses recipe.backbone_lr
    times that, after recipe.backbone_frozen_epochs.
    """
    new = {id(p) for n, p in model.named_parameters() if n.startswith("reducer.")}
    decayed = param_groups_weight_decay(
        model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay()
    )
    steps_per_epoch = total_steps / recipe.epochs

    def rate(scale: float, first_epoch: float, step: int) -> float:
        epoch = step / steps_per_epoch
        return 0.0 if epoch < first_epoch else scale * lr_at(epoch, recipe)

    groups, rates = list[Any](), list[Any]()
    kinds = [(True, 1.0, 0.0), (False, recipe.backbone_lr, recipe.backbone_frozen_epochs)]
    for of_reducer, scale, first_epoch in kinds if new else [(False, 1.0, 0.0)]:
        for group in decayed:
            chosen = [p for p in group["params"] if (id(p) in new) == of_reducer]
            if chosen:
                groups.append(group | dict(params=chosen, lr_scale=scale))
                rates.append(partial(rate, scale, first_epoch))
    cuda = torch.cuda.is_available() and groups[0]["params"][0].is_cuda
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=cuda or None)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # or none is clipped
    return optimizer, LambdaLR(optimizer, rates)


class Classifier(L.LightningModule):
    """Train a model by a recipe; checkpoints hold `knobs` under "evit".

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


class Setting(NamedTuple):
    """A reducer at a keep rate, as in the rows of evaluation.json; None: not applicable."""

    keep_rate: tuple[float, ...] = ()
    fusion: bool | None = None
    selection: str | None = None
    reducer: str | None = None


def setting_of(reducer: Reducer | None) -> Setting:
    """Describe an attached reducer as a Setting."""
    rates = () if reducer is None else reducer.keep_rate
    if reducer is None or set(rates) <= {1.0}:
        return Setting(rates)
    fusion, selection = (getattr(reducer, name, None) for name in ("fusion", "selection"))
    return Setting(rates, fusion, selection, reducer.name)


class Evaluator(L.LightningModule):
    """Evaluate a model with several reducers: `chosen`, or [None] for a model without.

    The dense model runs once; each reducer continues from the first block that it reduces.
    `results` has a dict(top1, top5, loss, kl, images) per reducer, over the images of all
    processes: top1, top5 in percent, kl = mean KL(dense || reduced) of the predictions. Random
    selections depend on batch, process and setting, not on the other reducers.
    """

    def __init__(self, model: Any, chosen: list[Any], num_classes: int, seed: int = 0):
        super().__init__()
        self.model, self.seed = model, seed
        self.settings = [setting_of(reducer) for reducer in chosen]
        self.reducers: Any = nn.ModuleList(filter(None, chosen))
        if self.reducers:
            self.depth, patches = len(model.blocks), model.patch_embed.num_patches
            self.dense = reducers.make("evit", keep_rate=1.0).attach(model)
            counts = [zip(r.at, r.kept(patches), strict=True) for r in chosen]
            self.starts = [next((i for i, k in c if k < patches), self.depth) for c in counts]
        self.top, self.results = min(5, num_classes), list[dict[str, Any]]()
        self.full = 0  # images per compiled batch; 0: nothing is compiled
        self.at = "preparing"  # progress text

    def compile_parts(self, batch_size: int) -> None:
        """Compile the parts that logits() calls for this batch size; other batches run eagerly."""
        self.full = batch_size
        for name in ("embed", "encode", "classify") if self.reducers else ("forward",):
            part: Any = torch.compile(getattr(self.model, name), dynamic=False)
            setattr(self.model, name, part)

    def logits(self, images: Tensor, batch_idx: int) -> Iterator[Tensor]:
        """Yield logits (B, num_classes) of the dense model, then of each reducer."""
        model = self.model
        images = images.to(next(model.parameters()).dtype)
        if not self.reducers:
            yield from 2 * [model(images)]
            return
        x, done, trunk = model.embed(images), 0, {}
        model.reducer = self.dense
        for start in sorted({*self.starts} - {self.depth}):
            x, _ = model.encode(x, done, start)
            trunk[start], done = x, start
        dense = model.classify(x, done)[0]
        yield dense
        for setting, reducer, start in zip(self.settings, self.reducers, self.starts, strict=True):
            model.reducer = reducer
            name = zlib.crc32(repr(setting).encode())
            torch.manual_seed(mix_seed(self.seed, batch_idx, self.global_rank, name))
            yield dense if start == self.depth else model.classify(trunk[start], start)[0]

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(len(self.settings), 5, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        if not len(labels):
            return
        odd = self.full and len(images) != self.full
        with torch.compiler.set_stance("force_eager") if odd else nullcontext():
            each = (logits.float() for logits in self.logits(images, batch_idx))
            dense = next(each)
            for i, (sums, found) in enumerate(zip(self.sums, each, strict=True), 1):
                count = sum(self.trainer.num_val_batches)
                place = f"batch {batch_idx + 1}/{count}, setting {i}/{len(self.sums)}"
                self.at = f"evaluating: {place}"
                right = 100.0 * (found.topk(self.top).indices == labels[:, None])
                loss = F.cross_entropy(found, labels, reduction="none")
                values = right[:, 0], right.sum(1), loss, divergence(found, dense)
                sums += torch.stack([v.double().sum() for v in (*values, torch.ones_like(loss))])

    def on_validation_epoch_end(self) -> None:
        sums: Any = self.trainer.strategy.reduce(self.sums, reduce_op="sum")
        for setting, (*totals, images) in zip(self.settings, sums.tolist(), strict=True):
            top1, top5, loss, kl = (total / images for total in totals)
            if not math.isfinite(loss):
                rates = "/".join(f"{rate:g}" for rate in setting.keep_rate)
                raise FloatingPointError(
                    f"the loss is {loss} at keep_rate {rates}: the checkpoint is of a model that "
                    f"has diverged, or precision {self.trainer.precision} is too low"
                )
            self.results.append(dict(top1=top1, top5=top5, loss=loss, kl=kl, images=int(images)))
