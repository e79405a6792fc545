"""ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461): merge the most similar pairs; and relatives.

In every block, each token at an even position (A) is matched to the most similar token at an odd
position (B), by the cosine of their keys. The r most similar pairs are merged into their mean,
weighted by sizes. Sizes enter the attention of later blocks. Cost: N^2 D / 4 products.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from evit.reducers.base import Reducer
from evit.reducers.blocks import project
from evit.reducers.tokens import Reduction, Seen, led, merge_into, pick, unit


def removals(r: Any, depth: int) -> list[Any]:
    """Number of tokens to remove in each block, from r: an int, a list, or (r, inflect): with
    inflect -1 it falls from 2 r to 0 over the blocks, with 1 it rises from 0 to 2 r."""
    if isinstance(r, Sequence) and len(r) == 2 and isinstance(r[1], float):
        low = int(r[0] * (1 - r[1]))
        step = (2 * r[0] - 2 * low) / max(depth - 1, 1)
        return [int(low + i * step) for i in range(depth)]
    given = list(r) if isinstance(r, Sequence) else [r] * depth
    if len(given) > depth or not all(isinstance(x, int | float) and x >= 0 for x in given):
        ways = f"a number, a list of at most {depth}, or (r, inflect) with inflect from -1.0 to 1.0"
        raise ValueError(f"r={r!r} must be tokens removed in every block: {ways}")
    return given + [0] * (depth - len(given))


def split(num_tokens: int, num_prefix: int, device: Any) -> list[Tensor]:
    """Image tokens in ToMe's set A (even positions of the whole sequence) and in B (odd)."""
    first = num_prefix % 2
    return [torch.arange(start, num_tokens, 2, device=device) for start in (first, 1 - first)]


def join(seen: Seen, a_BA: Tensor, b_BB: Tensor, match_BA: Tensor, stay_BS: Tensor) -> Reduction:
    """Merge tokens a into their matches in b, by sizes, except those in stay."""
    sizes, index_BK = seen.sizes(), torch.cat([stay_BS, b_BB], 1)
    host_BN = torch.zeros_like(sizes, dtype=torch.int64)
    host_BN = led(host_BN.scatter(1, a_BA, match_BA + stay_BS.shape[1]), index_BK)
    return merge_into(seen, index_BK, host_BN, sizes, sizes)


class Pairing(Reducer):
    """Base of ToMe, PiToMe and MCTF, which remove at most half of the tokens at a place.
    r: image tokens that each block removes (removals); prop_attn: sizes enter the attention."""

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
        metric = unit(seen.k_BHTD.mean(1)[:, seen.num_prefix :])
        B, n, _ = metric.shape
        a, b = (side.expand(B, -1) for side in split(n, seen.num_prefix, metric.device))
        score_BA, match_BA = (pick(metric, a) @ pick(metric, b).mT).max(2)
        order_BA = score_BA.argsort(1, descending=True)
        stay = order_BA[:, n - num_kept :].sort(1).values  # the others go into their matches in B
        return join(seen, a, b, match_BA, a.gather(1, stay))

    def macs(self, n: int, k: int, dim: int) -> int:
        return n * n // 4 * dim // self.num_heads + n * dim


class PiToMe(Pairing):
    """PiToMe (Tran et al., NeurIPS 2024, arXiv 2405.16148): merge the redundant tokens.

    The energy of a token is the mean of ELU(similarity - margin) to all others, by their keys; the
    margin falls with depth. Tokens of high energy are redundant. In the first half of the blocks
    all tokens pair up in order of energy; later only the 2 r tokens of highest energy do. Cost:
    N^2 D products. By default, as in the authors' code for DeiT and unlike the paper, sizes do not
    enter the attention. ratio: share of the image tokens that each block keeps."""

    name = "pitome"
    schedules = ("r", "ratio")

    def __init__(self, *, ratio: float | None = None, prop_attn: bool = False, **schedule: Any):
        super().__init__(prop_attn=prop_attn, **schedule)
        if ratio is not None and not 0.5 <= ratio <= 1:
            raise ValueError(f"ratio must be from 0.5 to 1, got {ratio}: it is per block")
        self.ratio, self.own = ratio, self.own or ratio is not None

    def removed(self, i: int, n: int) -> int:
        return super().removed(i, n) if self.ratio is None else int(n - n * self.ratio)

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        block, metric = self.at[i], unit(seen.k_BHTD.mean(1)[:, seen.num_prefix :])
        similarity_BNN, n = metric @ metric.mT, metric.shape[1]
        energy_BN = F.elu(similarity_BNN - (0.75 - 0.75 * block / self.depth)).mean(2)
        order_BN, r = energy_BN.argsort(1, descending=True), n - num_kept
        paired = n if block < (self.depth + 1) // 2 else 2 * r
        a, b, rest = order_BN[:, :paired:2], order_BN[:, 1:paired:2], order_BN[:, paired:]
        pairs_BAB = pick(similarity_BNN, a).gather(2, b[:, None].expand(-1, a.shape[1], -1))
        score_BA, match_BA = pairs_BAB.max(2)
        best_BA = score_BA.argsort(1, descending=True)
        return join(seen, a, b, match_BA, torch.cat([a.gather(1, best_BA[:, r:]), rest], 1))

    def macs(self, n: int, k: int, dim: int) -> int:
        return n * n * dim // self.num_heads + n * dim


class MCTF(Pairing):
    """MCTF (Lee et al., CVPR 2024, arXiv 2403.10030): fuse by similarity, importance and size.

    Before a block applies its attention, half of the tokens to remove are fused from A into B, and
    half from B into A, by cosine similarity times the inverse importance (mean attention received)
    times the inverse size. The block's attention matrix is fused too, and values are computed for
    the fused tokens only (one step ahead). Needs the full attention matrix of its blocks.

    r: image tokens removed by each block except the first; below 1, the share removed at each
    place of `at`. tau_sim, tau_info, tau_size: temperatures of the three criteria."""

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
