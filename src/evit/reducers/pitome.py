"""PiToMe (Tran et al., NeurIPS 2024, arXiv 2405.16148): merge the redundant tokens.

The energy of a token is the mean of ELU(similarity - margin) to all others, by their keys; the
margin falls with depth. Tokens of high energy are redundant. In the first half of the blocks all
tokens pair up in order of energy; in the second half only the 2 r tokens of highest energy do.
Cost: N^2 D products. Needs no training. The authors' code for DeiT weighs means by sizes but does
not use sizes in the attention; that is the default here.
"""

from typing import Any

import torch
import torch.nn.functional as F

from evit.reducers.tokens import Reduction, Seen, merge_into, unit
from evit.reducers.tome import Pairing


class PiToMe(Pairing):
    """Merge tokens of high energy.

    Args:
        ratio: share of the image tokens that each block keeps.
        prop_attn: sizes enter the attention, as in the paper but not in the authors' code.
    """

    name = "pitome"
    schedules = ("r", "ratio")

    def __init__(self, *, ratio: float | None = None, prop_attn: bool = False, **schedule: Any):
        super().__init__(prop_attn=prop_attn, **schedule)
        if ratio is not None and not 0.5 <= ratio <= 1:
            raise ValueError(f"ratio must be from 0.5 to 1, got {ratio}: it is per block")
        self.ratio = ratio
        self.own = self.own or ratio is not None

    def removed(self, i: int, n: int) -> int:
        return super().removed(i, n) if self.ratio is None else int(n - n * self.ratio)

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        sizes, block = seen.sizes(), self.at[i]
        n, r = sizes.shape[1], sizes.shape[1] - num_kept
        metric = unit(seen.k_BHTD.mean(1)[:, seen.num_prefix :])
        similarity_BNN = metric @ metric.mT
        margin = 0.75 - 0.75 * block / self.depth
        energy_BN = F.elu(similarity_BNN - margin).mean(2)
        order_BN = energy_BN.argsort(1, descending=True)
        early = block < (self.depth + 1) // 2
        paired = n if early else 2 * r
        a, b, rest = order_BN[:, :paired:2], order_BN[:, 1:paired:2], order_BN[:, paired:]
        rows = similarity_BNN.gather(1, a[..., None].expand(-1, -1, n))
        score_BA, match_BA = rows.gather(2, b[:, None].expand(-1, a.shape[1], -1)).max(2)
        best = score_BA.argsort(1, descending=True)
        stay = torch.cat([a.gather(1, best[:, r:]), rest], 1)
        index_BK = torch.cat([stay, b], 1)
        K = torch.arange(num_kept, device=a.device).expand_as(index_BK)
        host_BN = torch.zeros_like(order_BN).scatter(1, index_BK, K)
        go = a.gather(1, best[:, :r])
        matched = match_BA.gather(1, best[:, :r]) + stay.shape[1]
        return merge_into(seen, index_BK, host_BN.scatter(1, go, matched), sizes, sizes)

    def macs(self, n: int, k: int, dim: int) -> int:
        return n * n * dim // self.num_heads + n * dim
