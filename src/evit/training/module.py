"""The LightningModules: Classifier is trained by a recipe, Evaluator compares reducers."""

import hashlib
import math
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import lightning as L
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torchmetrics import MeanMetric, classification

from evit import reducers
from evit.config import Recipe
from evit.data.batch import augment_batch
from evit.reducers.dynamicvit import divergence

WAY_OUT = "resume=RUN/checkpoints/last.ckpt with a lower recipe.lr or recipe.clip_grad=1"


def mix_seed(*parts: int) -> int:
    """Hash numbers to a 32-bit seed; neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def lr_at(epoch: float, recipe: Recipe) -> float:
    """Learning rate at a (fractional) epoch: linear warm-up to the peak, then half a cosine."""
    start: float = recipe.warmup_epochs
    if recipe.lr_schedule != "plain":  # by epoch, the warm-up in the cosine; deit: an epoch late
        start, epoch = 0, max(math.floor(epoch) - (recipe.lr_schedule == "deit"), 0)
    if epoch < recipe.warmup_epochs:
        share = epoch / recipe.warmup_epochs
        return recipe.warmup_lr + (recipe.peak_lr - recipe.warmup_lr) * share
    progress = min(1.0, (epoch - start) / (recipe.epochs - recipe.cooldown_epochs - start))
    return recipe.min_lr + (recipe.peak_lr - recipe.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: Any, recipe: Recipe, total_steps: int) -> tuple[Any, Any]:
    """Make AdamW and its schedule over total_steps; biases, norms and embeddings do not decay."""
    new = {id(p) for n, p in model.named_parameters() if n.startswith("reducer.")}
    undecayed = model.no_weight_decay()
    decayed = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=undecayed)

    def rate(scale: float, first_epoch: float, step: int) -> float:
        epoch = step / (total_steps / recipe.epochs)
        return 0.0 if epoch < first_epoch else scale * lr_at(epoch, recipe)

    groups, rates = list[Any](), list[Any]()
    backbone = recipe.backbone_lr, recipe.backbone_frozen_epochs
    for of_reducer, scale, first_epoch in [(True, 1.0, 0.0), (False, *backbone)]:
        for group in decayed:
            if chosen := [p for p in group["params"] if (id(p) in new) == of_reducer]:
                groups.append(group | dict(params=chosen, lr_scale=scale))
                rates.append(partial(rate, scale, first_epoch))
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=groups[0]["params"][0].is_cuda or None)
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # or none is clipped
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates)


class Classifier(L.LightningModule):
    """Train a model by a recipe until a loss is not finite; checkpoints hold `knobs` as "evit"."""

    def __init__(self, model, recipe: Recipe, num_classes: int, objective, seed=0, knobs=None):
        super().__init__()
        self.model, self.recipe, self.seed = model, recipe, seed
        self.objective, self.knobs = objective, knobs
        self.steps, self.lr = list[tuple[Any, ...]](), 0.0  # those whose losses are to be looked at
        parameters = dict(model.named_parameters())
        apart = recipe.backbone_lr != 1 or recipe.backbone_frozen_epochs
        if apart and not any(name.startswith("reducer.") for name in parameters):
            what = "recipe.backbone_lr and recipe.backbone_frozen_epochs"
            raise ValueError(f"{what} are for a reducer that learns: leave them at 1 and 0")
        for name in recipe.frozen:
            if name not in parameters:
                raise ValueError(f"recipe.frozen: {type(model).__name__} has no {name!r}")
            parameters[name].requires_grad_(False)
        self.metrics: Any = nn.ModuleDict(dict(loss=MeanMetric(nan_strategy=math.nan)))  # keeps NaN
        for name, k in dict(top1=1, top5=min(5, num_classes)).items():
            self.metrics[name] = classification.MulticlassAccuracy(num_classes, k, "micro")

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        # Erasing, mixup and drop path draw from global generators: a resumed run draws the same.
        seed = mix_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        L.seed_everything(seed, verbose=False)
        losses = self.objective(*augment_batch(*batch, random_erasing=self.recipe.random_erasing))
        trainer, step = cast(Any, self.trainer), self.global_step + 1
        logged = trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0
        for name, value in losses.items():
            if logged:
                value = trainer.strategy.reduce(value.detach().clone())  # the mean of all processes
            self.log(f"train/{name}", value, prog_bar=name == "loss")
        at = step, self.lr, getattr(self.model, "keep_rate", ()), batch_idx
        self.steps.append((*at, losses["loss"].detach()))
        if logged:
            self.look()
        return losses["loss"]

    def look(self) -> None:
        """Check the losses since the last look (it waits for the GPU), in all processes at once."""
        steps, self.steps, trainer = self.steps, [], cast(Any, self.trainer)
        if not steps:
            return
        bad = ~torch.stack([loss for *_, loss in steps]).isfinite() * (self.global_rank + 1)
        bad = trainer.strategy.reduce(bad, reduce_op="max")
        if not bad.any():
            return
        first = int(bad.nonzero()[0])
        step, lr, rates, batch, loss = steps[first]
        at = f"epoch {self.current_epoch + 1}/{trainer.max_epochs}, step {step}, learning rate "
        at += f"{lr:.3g}, keep rate " + ("/".join(f"{rate:.3g}" for rate in rates) or "1")
        images = trainer.datamodule.describe_batch(self.current_epoch, batch)
        text = f"the loss is {loss} ({at}), for images of process {self.global_rank}: {images}"
        text = trainer.strategy.broadcast(text, int(bad[first]) - 1)
        raise FloatingPointError(f"{text}. No checkpoint contains this: {WAY_OUT}")

    on_validation_start = on_train_epoch_end = look

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
                at = f"epoch {self.current_epoch + 1}/{self.recipe.epochs}"
                raise FloatingPointError(f"val/{name} is {value} after {at}: {WAY_OUT}")
            self.log(f"val/{name}", value, prog_bar=name == "top1")

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        optimizer, scheduler = make_optimizer(self.model, self.recipe, int(steps))
        return [optimizer], [dict(scheduler=scheduler, interval="step")]

    def on_train_start(self) -> None:
        self.model.train(not self.recipe.train_in_eval_mode)
        if self.objective.teacher is not None:  # not a submodule, so not in checkpoints
            self.objective.teacher.to(self.device)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.current_epoch == self.recipe.epochs - 1:
            self.trainer.check_val_every_n_epoch = 1  # the last epoch is always evaluated
        self.lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("lr", self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.look()
        for name, value in self.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                text = f"after {self.global_step} steps {name} is not finite"
                raise FloatingPointError(f"{text}. No checkpoint contains this: {WAY_OUT}")
        if self.knobs:
            checkpoint["evit"] = self.knobs


class Setting(NamedTuple):
    """A reducer at a keep rate, as in the rows of evaluation.json; None: not applicable."""

    keep_rate: tuple[float, ...] = ()
    fusion: bool | None = None
    selection: str | None = None
    reducer: str | None = None


def setting_of(reducer: reducers.Reducer) -> Setting:
    if set(reducer.keep_rate) <= {1.0}:
        return Setting(reducer.keep_rate)
    fusion, selection = (getattr(reducer, name, None) for name in ("fusion", "selection"))
    return Setting(reducer.keep_rate, fusion, selection, reducer.name)


class Evaluator(L.LightningModule):
    """Evaluate a model with several reducers; the dense one runs once for all."""

    def __init__(self, model: Any, chosen: list[Any], num_classes: int, seed: int = 0):
        super().__init__()
        self.model, self.seed = model, seed
        self.settings = [setting_of(reducer) for reducer in chosen]
        self.reducers: Any = nn.ModuleList(chosen)
        self.depth, patches = len(model.blocks), model.patch_embed.num_patches
        self.dense = reducers.make("evit", keep_rate=1.0).attach(model)
        counts = [zip(r.at, r.kept(patches), strict=True) for r in chosen]
        self.starts = [next((i for i, k in c if k < patches), self.depth) for c in counts]
        self.top, self.results = min(5, num_classes), list[dict[str, Any]]()
        self.full, self.at = 0, "preparing"  # images per compiled batch, if any; progress

    def compile_parts(self, batch_size: int) -> None:
        """Compile the parts that logits() calls for this batch size; other batches run eagerly."""
        self.full = batch_size
        for name in ("embed", "encode", "classify"):
            setattr(self.model, name, torch.compile(getattr(self.model, name), dynamic=False))

    def logits(self, images: Tensor, batch_idx: int) -> Iterator[Tensor]:
        """Yield logits (B, num_classes) of the dense model, then of each reducer."""
        model = self.model
        images = images.to(next(model.parameters()).dtype)
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
        with torch.compiler.set_stance("force_eager" if odd else "default"):
            each = (logits.float() for logits in self.logits(images, batch_idx))
            dense = next(each)
            for i, (sums, found) in enumerate(zip(self.sums, each, strict=True), 1):
                self.at = f"evaluating: batch {batch_idx + 1}/{sum(self.trainer.num_val_batches)}"
                self.at += f", setting {i}/{len(self.sums)}"
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
                text = f"the loss is {loss} at keep_rate {rates}: the model has diverged"
                raise FloatingPointError(f"{text}, or {self.trainer.precision} is too low")
            self.results.append(dict(top1=top1, top5=top5, loss=loss, kl=kl, images=int(images)))
