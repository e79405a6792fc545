"""The LightningModule of evaluations: many settings of one model, in one pass over the data."""

import math
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from evit import reducers
from evit.reducers import Reducer
from evit.reducers.dynamicvit import divergence
from evit.training.module import mix_seed


@dataclass(frozen=True)
class Setting:
    """A reducer at a keep rate, as the rows of evaluation.json name it.

    reducer is None for the dense model; fusion and selection are None where they do not apply.
    """

    keep_rate: tuple[float, ...] = ()
    fusion: bool | None = None
    selection: str | None = None
    reducer: str | None = None


def setting_of(reducer: Reducer) -> Setting:
    """The setting that a reducer attached to a model stands for."""
    if all(rate == 1 for rate in reducer.keep_rate):
        return Setting(reducer.keep_rate)
    fusion, selection = (getattr(reducer, name, None) for name in ("fusion", "selection"))
    return Setting(reducer.keep_rate, fusion, selection, reducer.name)


class Evaluator(L.LightningModule):
    """Top-1, top-5 (percent), loss and divergence from the dense model, with each of some reducers.

    The dense model runs once; each reducer goes on from the block where it first reduces. `results`
    then has dict(top1, top5, loss, kl, images) for each, over the images of all processes. kl is
    KL(dense || reduced) of the predicted distributions, averaged over images.

    Random selections draw from a seed for each batch, process and setting: they do not depend on
    what else is evaluated.

    Args:
        chosen: reducers that are attached to the model, or [None] for a model that takes none.
    """

    def __init__(
        self, model: Any, chosen: list[Reducer] | list[None], num_classes: int, seed: int = 0
    ):
        super().__init__()
        self.model, self.seed = model, seed
        self.reducers: Any = nn.ModuleList(reducer for reducer in chosen if reducer is not None)
        self.settings = [setting_of(r) for r in chosen if r is not None] or [Setting()]
        self.starts, depth = [], 0
        if self.reducers:
            depth, patches = len(model.blocks), model.patch_embed.num_patches
            self.dense = reducers.make("evit", keep_rate=1.0).attach(model)
            own: Any = self.reducers
            for reducer in own:
                counts = zip(reducer.at, reducer.kept(patches), strict=True)
                self.starts.append(next((i for i, kept in counts if kept < patches), depth))
        self.depth = depth
        self.images = SumMetric()
        self.metrics: Any = nn.ModuleList(metrics(num_classes) for _ in self.settings)
        self.results: list[dict[str, Any]] = []
        self.due = time.monotonic() + 30

    def logits(self, images: Tensor, batch_idx: int) -> Iterator[Tensor]:
        """Logits (B, num_classes) of the dense model, then with each reducer."""
        model = self.model
        if not self.reducers:
            dense = model(images)
            yield from (dense, dense)
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

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        if not len(labels):
            return
        self.images.update(len(labels))
        logits = (found.float() for found in self.logits(images, batch_idx))
        dense = next(logits)
        for metric, found in zip(self.metrics, logits, strict=True):
            metric["loss"].update(F.cross_entropy(found, labels), len(labels))
            metric["kl"].update(divergence(found, dense).mean(), len(labels))
            metric["top1"].update(found, labels)
            metric["top5"].update(found, labels)
        if time.monotonic() > self.due and self.global_rank == 0 and not sys.stdout.isatty():
            self.due = time.monotonic() + 30
            batches = int(self.trainer.num_val_batches[0])
            print(f"evaluating {batch_idx + 1}/{batches} batches", flush=True)

    def on_validation_epoch_end(self) -> None:
        images = int(self.images.compute())
        self.results = [
            dict(
                top1=float(100 * metric["top1"].compute()),
                top5=float(100 * metric["top5"].compute()),
                loss=float(metric["loss"].compute()),
                kl=float(metric["kl"].compute()),
                images=images,
            )
            for metric in self.metrics
        ]
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()
        for setting, result in zip(self.settings, self.results, strict=True):
            if not math.isfinite(result["loss"]):
                rates = "/".join(f"{rate:g}" for rate in setting.keep_rate)
                raise FloatingPointError(
                    f"the loss is {result['loss']} at keep_rate {rates}: the checkpoint is of a "
                    f"model that has diverged, or precision {self.trainer.precision} is too low"
                )


def metrics(num_classes: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        dict(
            loss=MeanMetric(nan_strategy=math.nan),  # the default leaves NaN out of the mean
            kl=MeanMetric(nan_strategy=math.nan),
            top1=MulticlassAccuracy(num_classes, average="micro"),
            top5=MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
        )
    )
