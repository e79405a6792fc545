"""Evaluate many settings of one model in one pass over the data."""

import math
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evit import reducers
from evit.reducers import Reducer
from evit.reducers.dynamicvit import divergence
from evit.training.module import mix_seed


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
    """LightningModule that evaluates a model with several reducers (`chosen`, or [None] if none).

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
