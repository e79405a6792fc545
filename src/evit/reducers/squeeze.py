"""Token Pruning & Squeezing (Wei et al., CVPR 2023, arXiv 2304.10716).

Keeps the tokens of highest score, and merges ("squeezes") every other token into the kept one most
similar to it, with weight exp(cosine). Sizes are not tracked. Cost: N K C products.
"""

from typing import Any

from evit.reducers.base import Reducer
from evit.reducers.dynamicvit import DynamicViT
from evit.reducers.tokens import Reduction, Seen, merge_into, nearest


class Squeeze(DynamicViT):
    """Keep the tokens of highest score; squeeze the others into them.

    With predictors it trains like DynamicViT: decisions mask the attention, nothing is squeezed.

    Args:
        score: "class" for class attention, after the block's attention (eTPS), or "predictor" for
            DynamicViT's predictors, before the block (dTPS).
    """

    name = "squeeze"

    def __init__(self, *, score: str = "class", **schedule: Any):
        super().__init__(**schedule)
        if score not in ("class", "predictor"):
            raise ValueError(f"score must be class or predictor, got {score!r}")
        self.score, self.masked = score, score == "predictor"

    @property
    def stage(self) -> str:  # type: ignore[override]
        return "input" if self.masked else "residual"

    def build(self, dim: int) -> None:
        if self.masked:
            super().build(dim)

    def kept(self, n: int) -> list[int]:
        return super().kept(n) if self.masked else Reducer.kept(self, n)

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        score_BN = self.scores(i, seen) if self.masked else seen.scores()
        index_BK = score_BN.detach().topk(num_kept, sorted=False).indices
        cosine_BN, host_BN = nearest(seen.image(), index_BK, eps=1e-6)
        return merge_into(seen, index_BK, host_BN, cosine_BN.exp())

    def macs(self, n: int, k: int, dim: int) -> int:
        predictor = super().macs(n, k, dim) if self.masked else n
        return predictor + (n - k) * k * dim + (n - k) * dim
