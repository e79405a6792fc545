"""Token reorganization (EViT, ICLR 2022).

Score the image tokens, choose the best, fuse the rest into one or drop them. Pure functions on
tensors, whose shapes stand in the names:
    B images, H heads, D channels of a head, C channels of a token,
    P prefix tokens (the class token first), N image tokens, K kept image tokens, T = P + N tokens.
"""

import math

import torch
from torch import Tensor


def num_kept(num_tokens: int, keep_rate: float) -> int:
    """ceil(keep_rate * num_tokens): how many of the image tokens survive a reorganization."""
    return math.ceil(keep_rate * num_tokens)


def class_attention(
    q_BHTD: Tensor, k_BHTD: Tensor, num_prefix_tokens: int = 1, scale: float | None = None
) -> Tensor:
    """How much the class token attends to every image token, averaged over the heads.

    One row of the softmax attention, not the T x T matrix. The columns of the prefix tokens take
    part in the softmax and are then left out; the rest is not renormalised.

    Returns: (B, N), in float32 or wider.
    """
    scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    q_BHD1 = q_BHTD[:, :, 0, :, None] * scale
    row_BHT = (k_BHTD @ q_BHD1).squeeze(-1)
    wide = torch.promote_types(row_BHT.dtype, torch.float32)
    return row_BHT.softmax(-1, dtype=wide).mean(1)[:, num_prefix_tokens:]


SELECTIONS = ("attentive", "random", "inattentive")


def choose(score_BN: Tensor, k: int, selection: str = "attentive") -> Tensor:
    """Indices (B, K) of the k highest scores of each image, in no particular order.

    The other selections are the controls of the paper's motivation: k at random, the k lowest.
    """
    if selection == "random":
        score_BN = torch.rand_like(score_BN)
    return score_BN.topk(k, largest=selection != "inattentive", sorted=False).indices


def gather(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    """The chosen tokens, (B, K, C)."""
    return x_BNC.gather(1, index_BK[:, :, None].expand(-1, -1, x_BNC.shape[2]))


def fuse(x_BNC: Tensor, score_BN: Tensor, index_BK: Tensor) -> Tensor:
    """The tokens that were not chosen, summed with their raw scores as weights, (B, 1, C)."""
    weight_BN = score_BN.scatter(1, index_BK, 0.0).to(x_BNC.dtype)
    return torch.bmm(weight_BN[:, None], x_BNC)


def reorganize(x_BTC: Tensor, score_BN: Tensor, index_BK: Tensor, fusion: bool) -> Tensor:
    """The prefix and the chosen tokens and, with fusion, one token more for all the others, last.

    Returns: (B, P + K (+ 1 with fusion), C).
    """
    num_prefix = x_BTC.shape[1] - score_BN.shape[1]
    prefix_BP = torch.arange(num_prefix, device=x_BTC.device).expand(x_BTC.shape[0], -1)
    kept_BTC = gather(x_BTC, torch.cat([prefix_BP, index_BK + num_prefix], 1))
    if not fusion:
        return kept_BTC
    return torch.cat([kept_BTC, fuse(x_BTC[:, num_prefix:], score_BN, index_BK)], 1)


def follow(ids_BN: Tensor, index_BK: Tensor, fusion: bool) -> Tensor:
    """The ids of the image tokens that reorganize() returns; a fused token is -1."""
    kept_BK = ids_BN.gather(1, index_BK)
    return torch.nn.functional.pad(kept_BK, (0, 1), value=-1) if fusion else kept_BK
