"""ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461): merge the most similar pairs of tokens.

In every block, each token at an even position (A) is matched to the most similar token at an odd
position (B), by the cosine of their keys. The r most similar pairs are merged into their mean,
weighted by sizes. Sizes enter the attention of later blocks. Cost: N^2 D / 4 products. Needs no
training. Written from the paper.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from evit.reducers.base import Reducer
from evit.reducers.tokens import Reduction, Seen, merge_into, unit


def removals(r: Any, depth: int) -> list[Any]:
    """Number of tokens to remove in each block, from r: an int, a list, or (r, inflect).

    With inflect -1 the number falls from 2 r to 0 over the blocks, with 1 it rises from 0 to 2 r.
    """
    if isinstance(r, Sequence) and len(r) == 2 and isinstance(r[1], float):
        low = int(r[0] * (1 - r[1]))
        step = (2 * r[0] - 2 * low) / max(depth - 1, 1)
        return [int(low + i * step) for i in range(depth)]
    given = list(r) if isinstance(r, Sequence) else [r] * depth
    if len(given) > depth or not all(isinstance(x, int | float) and x >= 0 for x in given):
        ways = f"a number, a list of at most {depth}, or (r, inflect) with inflect from -1.0 to 1.0"
        raise ValueError(f"r={r!r} must be tokens removed in every block: {ways}")
    return given + [0] * (depth - len(given))


def split(num_tokens: int, num_prefix: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the image tokens in ToMe's set A (even positions of the whole sequence) and in B
    (odd), and the position of each image token in [A, B]."""
    first = num_prefix % 2
    a, b = (torch.arange(start, num_tokens, 2, device=device) for start in (first, 1 - first))
    return a, b, torch.cat([a, b]).argsort()


class Pairing(Reducer):
    """Base of ToMe, PiToMe and MCTF, which remove at most half of the tokens at a place.

    Args:
        r: image tokens that each block removes: an int, a list per block, or (r, inflect).
        prop_attn: sizes enter the attention (proportional attention).
    """

    schedules: ClassVar[tuple[str, ...]] = ("r",)

    def __init__(self, *, r: Any = None, prop_attn: bool = True, **schedule: Any):
        super().__init__(**schedule)
        self.r, self.prop_attn, self.proportional = r, prop_attn, prop_attn
        self.own = r is not None

    def fewest(self, n: int) -> int:
        return n - n // 2

    def wanted(self, i: int, n: int) -> int:
        return n - min(self.removed(i, n), n // 2) if self.own else super().wanted(i, n)

    def removed(self, i: int, n: int) -> int:
        """Number of n image tokens that place number i removes, by the method's own schedule."""
        return removals(self.r, self.depth)[self.at[i]]


class ToMe(Pairing):
    """Merge the r most similar pairs of tokens (the paper: without prop_attn for MAE's models)."""

    name = "tome"

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        sizes = seen.sizes()
        n, r = sizes.shape[1], sizes.shape[1] - num_kept
        a, b, place = split(n, seen.num_prefix, sizes.device)
        metric = unit(seen.k_BHTD.mean(1)[:, seen.num_prefix :])
        score_BA, match_BA = (metric[:, a] @ metric[:, b].mT).max(2)
        order_BA = score_BA.argsort(1, descending=True)
        stay_BS = order_BA[:, r:].sort(1).values  # the others go into their matches in B
        B, S = stay_BS.shape
        own_BS = torch.arange(S, device=a.device).expand(B, S)
        host_BA = (match_BA + S).scatter(1, stay_BS, own_BS)
        host_BB = torch.arange(S, S + len(b), device=a.device).expand(B, -1)
        host_BN = torch.cat([host_BA, host_BB], 1)[:, place]
        index_BK = torch.cat([a[stay_BS], b.expand(B, -1)], 1)
        return merge_into(seen, index_BK, host_BN, sizes, sizes)

    def macs(self, n: int, k: int, dim: int) -> int:
        return n * n // 4 * dim // self.num_heads + n * dim
