"""Tokens and linear maps over them: where each goes, with which weight.

Shapes stand in the names:
    B images, H heads, D channels of a head, C channels of a token,
    P prefix tokens (the class token first), N image tokens, T = P + N, K image tokens left.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain(module: nn.Module, kind: type) -> bool:
    """Whether a module is exactly of a kind, and nothing sees its inputs, outputs or weights."""
    own = module.__dict__
    return (
        type(module) is kind
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and "forward" not in own
    )


def wide(x: Tensor) -> torch.dtype:
    """float32, or a tensor's own type where that is wider."""
    return x.dtype if x.dtype.itemsize > 4 else torch.float32


def class_rows(
    q_BHTD: Tensor, k_BHTD: Tensor, scale: float | None = None, bias_B11T: Tensor | None = None
) -> Tensor:
    """Attention of the class token to every token, in each head.

    This is one row of the softmax attention, not the T x T matrix.

    Returns: (B, H, T), in float32 or wider.
    """
    scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    q_BHD1 = q_BHTD[:, :, 0, :, None] * scale
    if k_BHTD.is_cuda and torch.compiler.is_compiling():  # fuses; a matrix-vector product does not
        row_BHT = (k_BHTD * q_BHD1.mT).sum(-1)
    else:
        row_BHT = (k_BHTD @ q_BHD1).squeeze(-1)
    if bias_B11T is not None:
        row_BHT = row_BHT + bias_B11T[:, 0]
    return row_BHT.softmax(-1, dtype=wide(row_BHT))


@dataclass
class Seen:
    """What a reducer may look at.

    At stage "input" only x_BTC and num_prefix are set. At stage "residual" x_BTC is the residual
    stream after the block's attention, otherwise the tokens that enter the block. The queries are
    those of the class token alone where the reducer `selects`.
    """

    x_BTC: Tensor
    num_prefix: int
    q_BHTD: Any = None
    k_BHTD: Any = None
    v_BHTD: Any = None
    scale: float = 1.0
    sizes_BT: Tensor | None = None  # patches that each token stands for; None: one each
    rope_B1ND: Tensor | None = None  # at stage "block": rotary positions of the image tokens
    bias_B11T: Tensor | None = None  # log of the sizes, as the attention adds it to its logits
    class_token: bool = True

    def rows(self) -> Tensor:
        """How much attention each token gets, in each head, (B, H, T), in float32 or wider.

        The class token's attention where there is one, otherwise the mean over all queries.
        """
        if self.class_token:
            return class_rows(self.q_BHTD, self.k_BHTD, self.scale, self.bias_B11T)
        logits = ((self.q_BHTD * self.scale) @ self.k_BHTD.mT).float()
        return (logits if self.bias_B11T is None else logits + self.bias_B11T).softmax(-1).mean(2)

    def scores(self) -> Tensor:
        """rows() of the image tokens, averaged over the heads, (B, N).

        The columns of the prefix tokens take part in the softmax; the rest is not renormalised.
        """
        return self.rows().mean(1)[:, self.num_prefix :]

    def image(self) -> Tensor:
        """The image tokens, (B, N, C)."""
        return self.x_BTC[:, self.num_prefix :]

    def sizes(self) -> Tensor:
        """Patches that each image token stands for, (B, N), float32."""
        if self.sizes_BT is not None:
            return self.sizes_BT[:, self.num_prefix :]
        B, T, _ = self.x_BTC.shape
        return self.x_BTC.new_ones(B, T - self.num_prefix, dtype=torch.float32)


class Reduction:
    """A linear map from N image tokens to K; prefix tokens stay first and as they are.

    Args:
        index_BK: the old image tokens that the new ones continue; a mixture continues its leader.
        num_prefix: P.
        rest_BN: weights, zero for the tokens in index_BK, of a sum that is appended as one token.
        weight_BKN: weights of the old tokens in each new one, where tokens are merged; the weights
            of a new token sum to 1.
        host_BN: the new image token that each old one went into, -1 where it was dropped; default:
            what index_BK and rest_BN say.
        sizes_BT: patches that each token that is left stands for, prefix tokens included.
    """

    def __init__(
        self,
        index_BK: Tensor,
        num_prefix: int,
        rest_BN: Tensor | None = None,
        weight_BKN: Tensor | None = None,
        host_BN: Tensor | None = None,
        sizes_BT: Tensor | None = None,
    ):
        self.index_BK, self.num_prefix, self.sizes_BT = index_BK, num_prefix, sizes_BT
        self.rest_BN, self.weight_BKN, self.host_BN = rest_BN, weight_BKN, host_BN

    def __call__(self, x_BTC: Tensor) -> Tensor:
        """The tokens that are left, (B, P + K, C)."""
        prefix, image = x_BTC[:, : self.num_prefix], x_BTC[:, self.num_prefix :]
        if self.weight_BKN is not None:
            return torch.cat([prefix, self.weight_BKN.to(x_BTC.dtype) @ image], 1)
        parts = [prefix, image.gather(1, self.index_BK[..., None].expand(-1, -1, image.shape[2]))]
        if self.rest_BN is not None:
            parts.append(torch.bmm(self.rest_BN.to(x_BTC.dtype)[:, None], image))
        return torch.cat(parts, 1)

    def project(self, linear: nn.Module, x_BTC: Tensor) -> Tensor:
        """self(linear(x)), with the product for the tokens that are left alone.

        The bias counts once for each token of a sum, and once for a mean.
        """
        if not plain(linear, nn.Linear):
            return self(linear(x_BTC))
        bias: Any = linear.bias
        out = linear(self(x_BTC))
        if self.rest_BN is not None and bias is not None:
            more_B1 = (self.rest_BN.sum(1, keepdim=True) - 1).to(out.dtype)
            out[:, -1].add_(more_B1 * bias)
        return out

    @property
    def num_left(self) -> int:
        """Image tokens that are left, K, or K + 1 with a fused one."""
        return self.index_BK.shape[1] + (self.rest_BN is not None)

    def members(self, num_tokens: int) -> "Reduction":
        """The same groups as sums: each member counts once."""
        groups_K1 = torch.arange(self.index_BK.shape[1], device=self.index_BK.device)[:, None]
        member_BKN = (self.hosts(num_tokens - self.num_prefix)[:, None] == groups_K1).float()
        return Reduction(self.index_BK, self.num_prefix, None, member_BKN)

    def ids(self, ids_BN: Tensor) -> Tensor:
        """What the tokens that are left are called, (B, K); -1 is a fused token."""
        kept_BK = ids_BN.gather(1, self.index_BK)
        if self.sizes_BT is not None:  # a token of size 0 is padding
            kept_BK = torch.where(self.sizes_BT[:, self.num_prefix :] > 0, kept_BK, -1)
        return kept_BK if self.rest_BN is None else F.pad(kept_BK, (0, 1), value=-1)

    def positions(self, rope_B1ND: Any) -> Any:
        """Rotary positions of the tokens that are left: a merged one has its leader's, a fused one
        that of the heaviest in it. None stays None."""
        if rope_B1ND is None:
            return None
        index_BK = self.index_BK
        if self.rest_BN is not None:
            index_BK = torch.cat([index_BK, self.rest_BN.argmax(1, keepdim=True)], 1)
        rope_B1ND = rope_B1ND.expand(len(index_BK), -1, -1, -1)
        return rope_B1ND.gather(2, index_BK[:, None, :, None].expand(-1, 1, -1, rope_B1ND.shape[3]))

    def hosts(self, num_tokens: int) -> Tensor:
        """The new image token that each of N old ones went into, (B, N); -1: dropped."""
        if self.host_BN is not None:
            return self.host_BN
        B, K = self.index_BK.shape
        places_BK = torch.arange(K, device=self.index_BK.device).expand(B, K)
        rest = -1 if self.rest_BN is None else K
        return self.index_BK.new_full((B, num_tokens), rest).scatter(1, self.index_BK, places_BK)


def merge_into(
    seen: Seen, index_BK: Tensor, host_BN: Tensor, weight_BN: Tensor, sizes_BN: Tensor | None = None
) -> Reduction:
    """Merge every image token into its host: a mean with weights; sizes add up.

    As one small matrix product it is deterministic, exports, and costs about 2 % at 200 tokens.

    Args:
        index_BK: the image tokens that lead the groups.
        host_BN: the group of each image token, 0 to K - 1, or -1 where it is dropped.
        weight_BN: weight of each token in its group, before it is normalised; float32.
        sizes_BN: what each token adds to its group's size; None: sizes are not followed.
    """
    P, groups_K1 = seen.num_prefix, torch.arange(index_BK.shape[1], device=host_BN.device)[:, None]
    member_BKN = (host_BN[:, None] == groups_K1).to(weight_BN.dtype)
    share_BKN = member_BKN * weight_BN[:, None]
    total_BK1 = share_BKN.sum(2, keepdim=True)
    sizes_BT = None
    if sizes_BN is not None:
        sizes_BK = member_BKN @ sizes_BN[..., None].to(member_BKN.dtype)
        sizes_BT = F.pad(sizes_BK.squeeze(2).clamp(min=1), (P, 0), value=1.0).detach()
    return Reduction(index_BK, P, None, share_BKN / total_BK1, host_BN, sizes_BT)


def nearest(tokens_BNC: Tensor, index_BK: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """The most similar of the kept tokens in index_BK, for every image token; itself, if kept.

    Returns: cosine similarities (B, N), 1 for kept tokens, and places in index_BK (B, N).
    """
    tokens = unit(tokens_BNC, eps)
    kept = tokens.gather(1, index_BK[..., None].expand(-1, -1, tokens.shape[2]))
    cosine_BN, host_BN = (tokens @ kept.mT).max(2)
    own = torch.arange(index_BK.shape[1], device=host_BN.device).expand_as(index_BK)
    return cosine_BN.scatter(1, index_BK, 1.0), host_BN.scatter(1, index_BK, own)


def split(num_tokens: int, num_prefix: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens at even and at odd positions of the whole sequence: A and B of ToMe.

    Returns: indices of A, of B, and the place of each image token in A and B one after the other.
    """
    first = num_prefix % 2
    a, b = (torch.arange(start, num_tokens, 2, device=device) for start in (first, 1 - first))
    return a, b, torch.cat([a, b]).argsort()


def unit(x_BTC: Tensor, eps: float = 1e-12) -> Tensor:
    """Tokens of length 1, in float32 or wider and without gradients: what choices compare."""
    return F.normalize(x_BTC.detach().to(wide(x_BTC)), dim=-1, eps=eps)
