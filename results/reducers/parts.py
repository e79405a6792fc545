"""`cover` with its parts exchanged, one by one: which tokens stay, and what weighs in a group.

    PYTHONPATH=results/reducers python src/evaluate.py --config-dir results/reducers/conf \\
      checkpoint=RUN reducer=[cover,order_attention,weights_plain]
"""

from typing import Any

import torch

from evit.reducers import Reduction, Seen, merge_into, nearest
from evit.reducers.cover import Cover
from evit.reducers.tokens import unit


class Parts(Cover):
    """Cover with another order of the tokens, or other weights in a group.

    Args:
        label: what the table calls it.
        order: "cover", "attention" (the highest class attention stays), "random", or "density"
            (density times the distance to the nearest denser token, as DPC-KNN has it).
        weights: "attention", "size" or "plain".
    """

    def __init__(
        self, *, label: str, order: str = "cover", weights: str = "attention", **options: Any
    ):
        super().__init__(**options)
        self.name = label  # type: ignore[misc]
        self.order, self.weights = order, weights

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        score, sizes = seen.scores(), seen.sizes()
        if self.order == "cover":
            index = super().plan(i, seen, num_kept).index_BK
        else:
            index = self.ranks(score, seen).topk(num_kept).indices
        _, host = nearest(seen.image(), index)
        weights = dict(attention=score, size=sizes, plain=torch.ones_like(sizes))
        return merge_into(seen, index, host, weights[self.weights], sizes)

    def ranks(self, score: torch.Tensor, seen: Seen) -> torch.Tensor:
        if self.order == "attention":
            return score
        if self.order == "random":
            return torch.rand_like(score)
        tokens = unit(seen.image())
        distance = 1 - tokens @ tokens.mT
        density = (-distance.topk(6, largest=False).values.mean(2)).exp()  # 5 neighbours, itself
        denser = density[:, None, :] > density[:, :, None]
        return density * distance.masked_fill(~denser, 2.0).amin(2)
