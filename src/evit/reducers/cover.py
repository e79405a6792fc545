"""`cover`: keep tokens that cover the others; merge every other token into its nearest kept one.

A token ranks high if no token of higher class attention is similar to it. Its rank is 1 - (largest
cosine similarity to such a token), times attention^0.25 (relative to the mean), times size^0.5.
The K highest are kept; every other token joins its most similar kept token. A group becomes the
mean of its members weighted by class attention (EViT's fusion, once per group), and sizes enter
the attention of later blocks. Cost: N^2 C products. Related methods: docs/reducers.md.
"""

from dataclasses import replace
from typing import Any

import torch

from evit.reducers.base import Reducer
from evit.reducers.tokens import Reduction, Seen, led, merge_into, pick, unit, wide


class Cover(Reducer):
    """attention_power, size_power: exponents of a token's class attention and size in its rank."""

    name = "cover"
    stage = "residual"
    proportional = True

    def __init__(self, *, attention_power: float = 0.25, size_power: float = 0.5, **schedule: Any):
        super().__init__(**schedule)
        self.attention_power, self.size_power = attention_power, size_power

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        # In float32 at any precision of the model: in half precision close ranks would be equal.
        q, k = (part.to(wide(part)) for part in (seen.q_BHTD, seen.k_BHTD))
        with torch.autocast(q.device.type, enabled=False):
            weight_BN, sizes_BN = replace(seen, q_BHTD=q, k_BHTD=k).scores(), seen.sizes()
            score_BN, tokens_BNC = weight_BN.detach(), unit(seen.image())
            similarity_BNN = tokens_BNC @ tokens_BNC.mT
            # Compare with tokens of higher attention only; the highest has none and ranks first.
            higher_BNN = score_BN[:, None, :] > score_BN[:, :, None]
            nearest_BN = similarity_BNN.masked_fill(~higher_BNN, -1.0).amax(2)
            relative_BN = score_BN / score_BN.mean(1, keepdim=True)
            rank_BN = (1 - nearest_BN) * relative_BN**self.attention_power
            index_BK = (rank_BN * sizes_BN**self.size_power).topk(num_kept).indices
            host_BN = led(pick(similarity_BNN, index_BK).argmax(1), index_BK)
        return merge_into(seen, index_BK, host_BN, weight_BN, sizes_BN)

    def macs(self, n: int, k: int, dim: int) -> int:
        return n * n * dim + n * k * dim
