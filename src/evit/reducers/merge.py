"""`merge`, DiffRate (Chen et al., ICCV 2023, arXiv 2305.17997), and `squeeze` (TPS).

`merge` keeps the tokens of highest class attention, and merges every other token into the kept one
most similar to it after the block's attention. Sizes enter the attention of later blocks. Cost:
N K C products. DiffRate also prunes, with two token counts per block. Sizes are at least 1, as in
the authors' training code and unlike their inference code.
"""

import itertools
from typing import Any

import torch

from evit.reducers.base import Reducer
from evit.reducers.dynamicvit import DynamicViT
from evit.reducers.tokens import Reduction, Seen, merge_into, nearest


class Merge(Reducer):
    """Keep the tokens of highest class attention; merge the others into their nearest kept one."""

    name = "merge"
    stage = "residual"
    proportional = True
    prune_counts: list[int]  # DiffRate's

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        score_BN, n = seen.scores().detach(), seen.image().shape[1]
        ranked = min(self.prune_counts[i] - 1, n) if self.own else n  # DiffRate drops the others
        ranked_BR = score_BN.topk(ranked, sorted=True).indices
        index_BK = ranked_BR[:, :num_kept]
        cosine_BN, host_BN = nearest(seen.image(), index_BK)
        if ranked < n:
            host_BR = host_BN.gather(1, ranked_BR)
            host_BN = torch.full_like(host_BN, -1).scatter(1, ranked_BR, host_BR)
        weight_BN = torch.ones_like(cosine_BN)
        return merge_into(seen, index_BK, host_BN, weight_BN, seen.sizes() * cosine_BN)

    def macs(self, n: int, k: int, dim: int) -> int:
        return (n - k) * k * dim + n * dim


class DiffRate(Merge):
    """DiffRate's schedules: numbers of tokens after pruning (prune_counts) and then after merging
    (merge_counts) at each place, the class token included."""

    name = "diffrate"
    schedules = ("prune_counts", "merge_counts")

    def __init__(self, *, prune_counts: Any = None, merge_counts: Any = None, **schedule: Any):
        super().__init__(**schedule)
        self.prune_counts, self.merge_counts = list(prune_counts or ()), list(merge_counts or ())
        self.own = bool(self.prune_counts or self.merge_counts)
        pairs = itertools.zip_longest(self.prune_counts, self.merge_counts, fillvalue=0)
        if not all(pruned >= merged > 1 for pruned, merged in pairs):
            given = f"prune_counts={self.prune_counts} merge_counts={self.merge_counts}"
            raise ValueError(f"{given}: as many of each, none above the other, and at least 2")

    def check(self, n: int) -> None:
        if self.own and len(self.merge_counts) != len(self.at):
            what = f"one for each of {len(self.at)} places"
            raise ValueError(f"merge_counts={self.merge_counts} must be {what}")
        super().check(n)

    def wanted(self, i: int, n: int) -> int:
        return min(self.merge_counts[i] - 1, n) if self.own else super().wanted(i, n)


class Squeeze(DynamicViT):
    """Token Pruning & Squeezing (Wei et al., CVPR 2023, arXiv 2304.10716).

    Keep the tokens of highest score: "class" attention, after the block's attention (eTPS), or that
    of DynamicViT's "predictor", before the block (dTPS), which trains like DynamicViT. Merge every
    other token into the kept one most similar to it, with weight exp(cosine), without sizes.
    """

    name = "squeeze"

    def __init__(self, *, score: str = "class", **schedule: Any):
        super().__init__(**schedule)
        if score not in ("class", "predictor"):
            raise ValueError(f"score must be class or predictor, got {score!r}")
        self.score, self.masked = score, score == "predictor"
        self.stage = "input" if self.masked else "residual"

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        score_BN = self.scores(i, seen) if self.masked else seen.scores()
        index_BK = score_BN.detach().topk(num_kept, sorted=False).indices
        cosine_BN, host_BN = nearest(seen.image(), index_BK, eps=1e-6)
        return merge_into(seen, index_BK, host_BN, cosine_BN.exp())

    def macs(self, n: int, k: int, dim: int) -> int:
        predictor = super().macs(n, k, dim) if self.masked else n
        return predictor + (n - k) * k * dim + (n - k) * dim
