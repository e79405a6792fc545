"""More work for hard images: a low keep rate first, a higher one where that is unsure."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Cascade(nn.Module):
    """Classify at the first keep rate; images below a confidence again at the next.

    Confidence is the largest probability. Logits of an image do not depend on its batch.

    Args:
        model: a reduced model; it is set to the rates in turn, and should be good at all of them.
        rates: keep rates, from low to high; each one number, or one for each place.
        thresholds: confidence below which an image goes on, one for each step to the next rate.

    Attributes:
        images: how many images each rate has seen since they were last set to zero.
    """

    def __init__(self, model: Any, rates: Sequence[Any], thresholds: float | Sequence[float]):
        super().__init__()
        wanted = [thresholds] if isinstance(thresholds, int | float) else list(thresholds)
        if len(rates) < 2 or len(wanted) != len(rates) - 1:
            raise ValueError(
                f"a cascade has two keep rates or more and a threshold between each two: got "
                f"rates={list(rates)} and thresholds={wanted}"
            )
        self.model, self.rates, self.thresholds = model, list(rates), wanted
        self.images = [0] * len(rates)

    def at(self, step: int, images: Tensor) -> Tensor:
        """Logits at the rate of one step."""
        self.model.set_keep_rate(self.rates[step])
        self.images[step] += len(images)
        return self.model(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W)."""
        logits = self.at(0, images)
        for step, threshold in enumerate(self.thresholds, 1):
            unsure = (logits.softmax(1).amax(1) < threshold).nonzero().flatten()
            if not len(unsure):
                break
            logits = logits.index_copy(0, unsure, self.at(step, images[unsure]).to(logits.dtype))
        return logits

    def macs(self, costs: Sequence[float]) -> float:
        """Mean cost of an image, from what each rate costs and the images seen so far."""
        return sum(c * n for c, n in zip(costs, self.images, strict=True)) / max(self.images[0], 1)
