"""EViT (Liang et al., ICLR 2022, arXiv 2202.07800): keep the tokens the class token attends to.

In a few blocks, between attention and MLP, keep the k = ceil(keep_rate * n) of n image tokens with
the highest class attention, and fuse the others into one token: their sum, weighted by their class
attention (the mean over heads of the class token's softmax row). Extra cost: that row and the sum.
`drop` drops the other tokens, `random` keeps k tokens at random: the paper's baselines.

EViT.plan chooses the tokens and the weights of the fused one; reducers/blocks.py calls it in those
blocks, once the class attention is known, and applies the Reduction. Names end in their shapes
(legend: reducers/tokens.py). To add a method, write such a class: docs/reducers.md.
"""

from typing import Any

import torch

from evit.reducers.base import Reducer
from evit.reducers.tokens import Reduction, Seen

SELECTIONS = ("attentive", "random", "inattentive")


class EViT(Reducer):
    """Keep the tokens of highest class attention; fuse the others into one, or drop them.

    Args:
        fusion: fuse the other tokens into one; False drops them.
        selection: the tokens to keep: "attentive", or as baselines "random" or "inattentive".
        **schedule: keep_rate, at, counts, as in Reducer.
    """

    name = "evit"

    def __init__(self, *, fusion: bool = True, selection: str = "attentive", **schedule: Any):
        super().__init__(**schedule)
        if selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
        self.fusion, self.selection = bool(fusion), selection

    @property
    def selects(self) -> bool:  # type: ignore[override]
        return not self.fusion  # then only the kept tokens need a query

    @property
    def extra(self) -> int:  # type: ignore[override]
        return int(self.fusion)  # the fused token

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        score_BN = seen.scores()  # class attention of the N image tokens
        ranked_BN = torch.rand_like(score_BN) if self.selection == "random" else score_BN
        largest = self.selection != "inattentive"
        index_BK = ranked_BN.topk(num_kept, largest=largest, sorted=False).indices
        # Weights of the fused token: class attention, 0 for the tokens that are kept.
        rest_BN = score_BN.scatter(1, index_BK, 0.0) if self.fusion else None
        return Reduction(index_BK, seen.num_prefix, rest_BN)

    def macs(self, n: int, k: int, dim: int) -> int:
        return n + (n - k) * dim * self.fusion


class Drop(EViT):
    """Keep the tokens of highest class attention and drop the others (Top-K)."""

    name = "drop"
    fixed = ("fusion",)

    def __init__(self, *, selection: str = "attentive", **schedule: Any):
        super().__init__(fusion=False, selection=selection, **schedule)


class Random(EViT):
    """Keep tokens at random and drop the others."""

    name = "random"
    fixed = ("fusion", "selection")

    def __init__(self, **schedule: Any):
        super().__init__(fusion=False, selection="random", **schedule)
