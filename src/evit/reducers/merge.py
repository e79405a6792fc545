"""`merge` and DiffRate (Chen et al., ICCV 2023, arXiv 2305.17997).

`merge` keeps the tokens of highest class attention, and merges every other token into the kept one
most similar to it after the block's attention. Sizes enter the attention of later blocks. Cost:
N K C products. DiffRate also prunes, with two token counts per block. Sizes are at least 1, as in
the authors' training code and unlike their inference code.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from evit.reducers.base import Reducer
from evit.reducers.tokens import Reduction, Seen, merge_into, nearest


def merge(seen: Seen, score_BN: torch.Tensor, num_ranked: int, num_kept: int) -> Reduction:
    """Keep the num_kept best tokens, merge the rest of the num_ranked best, drop the others."""
    ranked = score_BN.topk(num_ranked, sorted=True).indices
    index_BK = ranked[:, :num_kept]
    cosine_BN, host_BN = nearest(seen.image(), index_BK)
    if num_ranked < score_BN.shape[1]:
        takes_part = torch.zeros_like(host_BN, dtype=torch.bool).scatter(1, ranked, True)
        host_BN = torch.where(takes_part, host_BN, -1)
    plain = torch.ones_like(cosine_BN)
    return merge_into(seen, index_BK, host_BN, plain, seen.sizes() * cosine_BN)


class Merge(Reducer):
    """Keep the tokens of highest class attention; merge the others into their nearest kept one."""

    name = "merge"
    stage = "residual"
    proportional = True

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        score_BN = seen.scores().detach()
        return merge(seen, score_BN, score_BN.shape[1], num_kept)

    def macs(self, n: int, k: int, dim: int) -> int:
        return (n - k) * k * dim + n * dim


class DiffRate(Merge):
    """DiffRate's schedules: prune, then merge, with two token counts per block.

    Args:
        prune_counts, merge_counts: number of tokens after pruning and after merging at each place,
            the class token included.
    """

    name = "diffrate"
    schedules = ("prune_counts", "merge_counts")

    def __init__(
        self,
        *,
        prune_counts: Sequence[int] | None = None,
        merge_counts: Sequence[int] | None = None,
        **schedule: Any,
    ):
        super().__init__(**schedule)
        self.prune_counts, self.merge_counts = list(prune_counts or ()), list(merge_counts or ())
        self.own = bool(self.prune_counts or self.merge_counts)
        pairs = itertools.zip_longest(self.prune_counts, self.merge_counts, fillvalue=0)
        if not all(pruned >= merged > 1 for pruned, merged in pairs):
            given = f"prune_counts={self.prune_counts} merge_counts={self.merge_counts}"
            raise ValueError(f"{given}: as many of each, none above the other, and at least 2")

    def wanted(self, i: int, n: int) -> int:
        return min(self.merge_counts[i] - 1, n) if self.own else super().wanted(i, n)

    def check(self, n: int) -> None:
        if self.own and len(self.merge_counts) != len(self.at):
            what = f"one for each of {len(self.at)} places"
            raise ValueError(f"merge_counts={self.merge_counts} must be {what}")
        super().check(n)

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        score_BN = seen.scores().detach()
        ranked = self.prune_counts[i] - 1 if self.own else score_BN.shape[1]
        return merge(seen, score_BN, min(ranked, score_BN.shape[1]), num_kept)
