"""Spend more on hard images: a low keep rate first, a higher one for unsure predictions."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Cascade(nn.Module):
    """Classify at the first keep rate, and again at the next if the confidence is too low.

    Confidence is the largest probability. Logits of an image do not depend on its batch.

    Args:
        model: a reduced model, trained for all of these rates; its keep rate is changed.
        rates: keep rates from low to high; each one number, or one per place.
        thresholds: confidence below which an image goes to the next rate: one for each step.

    Attributes:
        images: number of images that each rate has classified so far.
    """

    def __init__(self, model: Any, rates: Sequence[Any], thresholds: float | Sequence[float]):
        super().__init__()
        wanted = [thresholds] if isinstance(thresholds, int | float) else list(thresholds)
        if len(rates) < 2 or len(wanted) != len(rates) - 1:
            needed = "two keep rates or more and a threshold between each two"
            raise ValueError(f"a cascade has {needed}: got {list(rates)} and {wanted}")
        self.model, self.rates, self.thresholds = model, list(rates), wanted
        self.images = [0] * len(rates)

    def _at(self, step: int, images: Tensor) -> Tensor:
        self.model.set_keep_rate(self.rates[step])
        self.images[step] += len(images)
        return self.model(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W)."""
        logits = self._at(0, images)
        for step, threshold in enumerate(self.thresholds, 1):
            unsure = (logits.softmax(1).amax(1) < threshold).nonzero().flatten()
            if not len(unsure):
                break
            logits = logits.index_copy(0, unsure, self._at(step, images[unsure]).to(logits.dtype))
        return logits

    def macs(self, costs: Sequence[float]) -> float:
        """Mean cost per image so far, from the cost of each rate."""
        return sum(c * n for c, n in zip(costs, self.images, strict=True)) / max(self.images[0], 1)
