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
from evit.reducers.tokens import Reduction, Seen, merge_into, unit
from evit.reducers.tome import Pairing, split


class MCTF(Pairing):
    """Fuse tokens by similarity, importance and size, before the values are computed.

    Args:
        r: image tokens removed by each block except the first; below 1, the share removed at each
            place of `at`.
        prop_attn: sizes enter the attention.
        one_step_ahead: fuse before the attention is applied; otherwise after the MLP.
        tau_sim, tau_info, tau_size: temperatures of the three criteria.
    """

    name = "mctf"
    stage = "block"

    def __init__(
        self,
        *,
        one_step_ahead: bool | int = True,
        tau_sim: float = 1.0,
        tau_info: float = 20.0,
        tau_size: float = 40.0,
        **options: Any,
    ):
        super().__init__(**options)
        taus = dict(tau_sim=tau_sim, tau_info=tau_info, tau_size=tau_size)
        if any(not tau > 0 for tau in taus.values()):
            raise ValueError(f"{taus} must be above 0")
        self.one_step_ahead = bool(one_step_ahead)
        self.tau_sim, self.tau_info, self.tau_size = tau_sim, tau_info, tau_size
        self.share = self.r if isinstance(self.r, float) and self.r < 1 else None

    def attach(self, model: Any) -> Any:
        if self.share is not None and self.at_default:
            self.at, self.at_default = tuple(self.quarters(len(model.blocks))), False
        return super().attach(model)

    def removed(self, i: int, n: int) -> int:
        if self.share is not None:
            r = int(self.share * n)
        else:
            r = 0 if self.at[i] == 0 and self.at_default else super().removed(i, n)
        return max(min(r, n + 1 - 10), 0)

    def through(self, block: Any, i: int, seen: Seen, num_kept: int) -> tuple[Tensor, Reduction]:
        attn, x = block.attn, seen.x_BTC
        y = block.norm1(x)
        q, k, *v = project(attn, y, 0, 2 if self.one_step_ahead else 3, seen.rope_B1ND)
        logits = (q * attn.scale) @ k.mT
        weight_BHTT = (logits if seen.bias_B11T is None else logits + seen.bias_B11T).softmax(-1)
        if not self.one_step_ahead:
            out = (attn.attn_drop(weight_BHTT) @ v[0]).transpose(1, 2).flatten(2)
            seen.x_BTC = x = block.after(block.add(x, block.projected(attn.norm(out))))
            reduction = self.fuse(seen, weight_BHTT, num_kept)
            return reduction(x), reduction
        reduction = self.fuse(seen, weight_BHTT, num_kept)
        x = reduction(x)
        (value,) = project(attn, block.norm1(x), 2, 3)
        rows = reduction(weight_BHTT.transpose(1, 2).flatten(2))  # (B, T', H T): a mean
        rows = rows.unflatten(2, weight_BHTT.shape[1:4:2]).permute(0, 3, 1, 2)  # (B, T, T', H)
        groups = torch.arange(num_kept, device=x.device)[:, None]
        member_BKN = (reduction.hosts(rows.shape[1])[:, None] == groups).float()
        summed = Reduction(reduction.index_BK, seen.num_prefix, None, member_BKN)(rows.flatten(2))
        fused = summed.unflatten(2, rows.shape[2:]).permute(0, 3, 2, 1)
        out = (attn.attn_drop(fused) @ value).transpose(1, 2).flatten(2)
        return block.after(block.add(x, block.projected(attn.norm(out)))), reduction

    def fuse(self, seen: Seen, weight_BHTT: Tensor, num_kept: int) -> Reduction:
        sizes, P, n = seen.sizes(), seen.num_prefix, seen.x_BTC.shape[1] - seen.num_prefix
        importance_BT = weight_BHTT.detach().float().mean((1, 2))
        # The paper's shares of the largest ones differ by a factor for each image: the order stays.
        value_BN = importance_BT[:, P:] ** (-1 / self.tau_info) * sizes ** (-1 / self.tau_size)
        a, b, place = split(n, P, sizes.device)
        tokens = unit(seen.image())
        cosine = (tokens[:, a] @ tokens[:, b].mT + 1) / 2
        W = cosine ** (1 / self.tau_sim) * value_BN[:, a, None] * value_BN[:, None, b]
        r = n - num_kept
        r1, r2 = r // 2, r - r // 2
        best_BA, match_BA = W.max(2)
        order = best_BA.argsort(1, descending=True)
        stay_a = order[:, r1:].sort(1).values
        back = W.gather(1, stay_a[..., None].expand(-1, -1, len(b))).mT
        best_BB, match_BB = back.max(2)  # numbers within stay_a
        order_b = best_BB.argsort(1, descending=True)
        stay_b, S = order_b[:, r2:], stay_a.shape[1]
        places = torch.arange(len(b) - r2, device=a.device) + S
        host_BB = match_BB.scatter(1, stay_b, places.expand_as(stay_b))
        host_BA = host_BB.gather(1, match_BA)
        host_BA = host_BA.scatter(1, stay_a, torch.arange(S, device=a.device).expand_as(stay_a))
        host_BN = torch.cat([host_BA, host_BB], 1)[:, place]
        index_BK = torch.cat([a[stay_a], b[stay_b]], 1)
        return merge_into(seen, index_BK, host_BN, importance_BT[:, P:] * sizes, sizes)

    def macs(self, n: int, k: int, dim: int) -> int:
        a, b = n + self.num_prefix, k + self.num_prefix
        if not self.one_step_ahead:
            return n * n // 4 * dim
        return n * n // 4 * dim - 2 * (a - b) * dim**2 - (a**2 - b**2) * dim
