"""Keep rate over training: 1 at first, then half a cosine down to the final value."""

import math
from collections.abc import Sequence


def keep_rate_at(
    step: int,
    steps_per_epoch: int,
    keep_rate: Sequence[float],
    shrink_start_epoch: int,
    shrink_epochs: int,
) -> tuple[float, ...]:
    """Keep rate of each place at a training step, as EViT's authors anneal it.

    It is 1 before epoch shrink_start_epoch, keep_rate after shrink_epochs more epochs, and in
    between rate + (1 - rate) * (1 + cos(pi * progress)) / 2. Theirs is one number for all places;
    here each place moves to its own rate, which is the same if the rates are equal.
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
