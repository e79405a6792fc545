"""Keep rate over training: dense at first, then down to its final value along half a cosine."""

import math
from collections.abc import Sequence


def keep_rate_at(
    step: int,
    steps_per_epoch: int,
    keep_rate: Sequence[float],
    shrink_start_epoch: int,
    shrink_epochs: int,
) -> tuple[float, ...]:
    """The keep rate of each reorganization at a training step, as EViT's authors anneal it.

    1 before epoch shrink_start_epoch, keep_rate from shrink_epochs later on, in between
    rate + (1 - rate) * (1 + cos(pi * progress)) / 2. Their schedule is one number for all; here
    each reorganization moves to its own rate, which is theirs where the rates are equal.
    """
    epoch = step // steps_per_epoch
    if epoch < shrink_start_epoch:
        dense = 1.0
    elif epoch >= shrink_start_epoch + shrink_epochs:
        dense = 0.0
    else:
        progress = (step / steps_per_epoch - shrink_start_epoch) / shrink_epochs
        dense = (1 + math.cos(math.pi * progress)) / 2
    return tuple(rate + (1 - rate) * dense for rate in keep_rate)
