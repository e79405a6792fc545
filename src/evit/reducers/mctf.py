"""MCTF (Lee et al., CVPR 2024, arXiv 2403.10030): fuse by similarity, importance and size.

Before a block applies its attention, tokens at even positions (A) and odd positions (B) are fused,
half of them from A into B and half from B into A, by cosine similarity times the inverse
importance (mean attention received) times the inverse size. The block's attention matrix is fused
too, and values are computed for the fused tokens only (one step ahead). Needs the full attention
matrix of its blocks. Written from the paper.
"""

from typing import Any

import torch
from torch import Tensor

from evit.reducers.blocks import project
from evit.reducers.tokens import Reduction, Seen, led, merge_into, pick, unit
from evit.reducers.tome import Pairing, split


class MCTF(Pairing):
    """Fuse tokens by similarity, importance and size, before the values are computed.

    r: image tokens removed by each block except the first; below 1, the share removed at each
    place of `at`. tau_sim, tau_info, tau_size: temperatures of the three criteria.
    """

    name = "mctf"
    stage = "block"

    def __init__(
        self, *, tau_sim: float = 1.0, tau_info: float = 20.0, tau_size: float = 40.0, **more: Any
    ):
        super().__init__(**more)
        if not all(tau > 0 for tau in (tau_sim, tau_info, tau_size)):
            raise ValueError(f"{tau_sim=}, {tau_info=} and {tau_size=} must be above 0")
        self.tau_sim, self.tau_info, self.tau_size = tau_sim, tau_info, tau_size
        self.share = self.r if isinstance(self.r, float) and self.r < 1 else None

    def removed(self, i: int, n: int) -> int:
        if self.share is not None:
            r = int(self.share * n)
        else:
            r = 0 if self.at[i] == 0 and self.at_default else super().removed(i, n)
        return max(min(r, n + 1 - 10), 0)

    def through(self, block: Any, i: int, seen: Seen, num_kept: int) -> tuple[Tensor, Reduction]:
        """Return the block's output for the remaining tokens, and the reduction."""
        attn, x = block.attn, seen.x_BTC
        q, k = project(attn, block.norm1(x), 0, 2, seen.rope_B1ND)
        logits = (q * attn.scale) @ k.mT
        weight_BHTT = (logits if seen.bias_B11T is None else logits + seen.bias_B11T).softmax(-1)
        reduction = self.fuse(seen, weight_BHTT, num_kept)
        x = reduction(x)
        (value,) = project(attn, block.norm1(x), 2, 3)
        rows = reduction(weight_BHTT.transpose(1, 2).flatten(2))  # (B, T', H T): a mean
        rows = rows.unflatten(2, weight_BHTT.shape[1:4:2]).permute(0, 3, 1, 2)  # (B, T, T', H)
        groups = torch.arange(num_kept, device=x.device)[:, None]
        member_BKN = (reduction.hosts(rows.shape[1])[:, None] == groups).float()
        summed = Reduction(reduction.index_BK, seen.num_prefix, None, member_BKN)(rows.flatten(2))
        fused = summed.unflatten(2, rows.shape[2:]).permute(0, 3, 2, 1)
        out = attn.norm((attn.attn_drop(fused) @ value).transpose(1, 2).flatten(2))
        return block.after(block.add(x, block.projected(out))), reduction

    def fuse(self, seen: Seen, weight_BHTT: Tensor, num_kept: int) -> Reduction:
        tokens, sizes = unit(seen.image()), seen.sizes()
        importance_BN = weight_BHTT.detach().float().mean((1, 2))[:, seen.num_prefix :]
        # The paper's shares of the largest ones differ by a factor for each image: the order stays.
        value_BN = importance_BN ** (-1 / self.tau_info) * sizes ** (-1 / self.tau_size)
        n, r = sizes.shape[1], sizes.shape[1] - num_kept
        a, b = split(n, seen.num_prefix, sizes.device)
        cosine = (tokens[:, a] @ tokens[:, b].mT + 1) / 2
        W = cosine ** (1 / self.tau_sim) * value_BN[:, a, None] * value_BN[:, None, b]
        best_BA, match_BA = W.max(2)
        stay_a = best_BA.argsort(1, descending=True)[:, r // 2 :].sort(1).values
        best_BB, match_BB = pick(W, stay_a).mT.max(2)  # matches are numbers within stay_a
        stay_b = best_BB.argsort(1, descending=True)[:, r - r // 2 :]
        S, index_BK = stay_a.shape[1], torch.cat([a[stay_a], b[stay_b]], 1)
        host_BB = led(match_BB - S, stay_b) + S  # those that stay come after stay_a
        host_BN = torch.cat([host_BB.gather(1, match_BA), host_BB], 1)
        host_BN = led(host_BN[:, torch.cat([a, b]).argsort()], index_BK)
        return merge_into(seen, index_BK, host_BN, importance_BN * sizes, sizes)

    def macs(self, n: int, k: int, dim: int) -> int:
        a, b = n + self.num_prefix, k + self.num_prefix
        return n * n // 4 * dim - 2 * (a - b) * dim**2 - (a**2 - b**2) * dim
