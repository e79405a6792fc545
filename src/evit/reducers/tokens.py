"""What a reducer sees (Seen), what it returns (Reduction), and where each patch goes by that.

Names end in their shapes:
    B images, H heads, D channels of a head, C channels of a token,
    P prefix tokens (the class token first), N image tokens, T = P + N, K image tokens left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Module: Any = nn.Module  # base of mixins that use attributes of timm's classes
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def plain(module: nn.Module, *kinds: type) -> bool:
    """Whether a module is of exactly such a type, without hooks, wrappers or parametrizations."""
    own = module.__dict__
    return type(module) in kinds and "forward" not in own and not any(own[name] for name in HOOKS)


def wide(x: Tensor) -> torch.dtype:
    """The tensor's dtype, but at least float32."""
    return x.dtype if x.dtype.itemsize > 4 else torch.float32


@dataclass
class Seen:
    """Input of Reducer.plan: the tokens of a block, and its queries, keys and values.

    x_BTC enter the block; at stage "residual" they are the residual stream after its attention.
    Stage "input" has no q, k and v. If the reducer `selects`, q may be the class token's only.
    """

    x_BTC: Tensor
    num_prefix: int
    q_BHTD: Any = None
    k_BHTD: Any = None
    v_BHTD: Any = None
    scale: float = 1.0
    sizes_BT: Tensor | None = None  # number of patches merged into each token; None: one each
    rope_B1ND: Tensor | None = None  # rotary positions of the image tokens
    bias_B11T: Tensor | None = None  # log of the sizes, added to the attention logits
    class_token: bool = True

    def rows(self) -> Tensor:
        """Attention of the class token (without one: mean over all queries) to each token in each
        head, (B, H, T), in float32 or wider: one row of the softmax."""
        k_BHTD, bias_B11T = self.k_BHTD, self.bias_B11T
        if not self.class_token:
            logits = ((self.q_BHTD * self.scale) @ k_BHTD.mT).float()
            return (logits if bias_B11T is None else logits + bias_B11T).softmax(-1).mean(2)
        q_BHD1 = self.q_BHTD[:, :, 0, :, None] * self.scale
        if k_BHTD.is_cuda and torch.compiler.is_compiling():  # fuses; a product with a row does not
            row_BHT = (k_BHTD * q_BHD1.mT).sum(-1)
        else:
            row_BHT = (k_BHTD @ q_BHD1).squeeze(-1)
        row_BHT = row_BHT if bias_B11T is None else row_BHT + bias_B11T[:, 0]
        return row_BHT.softmax(-1, dtype=wide(row_BHT))

    def scores(self) -> Tensor:
        """Class attention of the image tokens, mean over the heads, (B, N); not renormalised."""
        return self.rows().mean(1)[:, self.num_prefix :]

    def image(self) -> Tensor:
        """The image tokens, (B, N, C)."""
        return self.x_BTC[:, self.num_prefix :]

    def sizes(self) -> Tensor:
        """Number of patches merged into each image token, (B, N), float32."""
        if self.sizes_BT is not None:
            return self.sizes_BT[:, self.num_prefix :]
        return torch.ones_like(self.image()[:, :, 0], dtype=torch.float32)


@dataclass(eq=False)
class Reduction:
    """Linear map from N image tokens to K; prefix tokens stay first and unchanged."""

    index_BK: Tensor  # the kept image tokens; where tokens are merged, the leader of each group
    num_prefix: int
    rest_BN: Tensor | None = None  # weights of the sum that is one more token; 0 for kept ones
    weight_BKN: Tensor | None = None  # of each old token in each new one, summing to 1 over N
    host_BN: Tensor | None = None  # the new token that contains each old one, -1: dropped
    sizes_BT: Tensor | None = None  # number of patches in each new token, prefix tokens included

    def __call__(self, x_BTC: Tensor) -> Tensor:
        """Apply the map to tokens (B, P + N, C); returns (B, P + K, C)."""
        prefix, image = x_BTC[:, : self.num_prefix], x_BTC[:, self.num_prefix :]
        if self.weight_BKN is not None:
            return torch.cat([prefix, self.weight_BKN.to(x_BTC.dtype) @ image], 1)
        parts = [prefix, pick(image, self.index_BK)]
        if self.rest_BN is not None:
            parts.append(torch.bmm(self.rest_BN.to(x_BTC.dtype)[:, None], image))
        return torch.cat(parts, 1)

    def project(self, linear: Any, x_BTC: Tensor) -> Tensor:
        """self(linear(x)), with the linear layer applied after the reduction. The bias of a fused
        token, a weighted sum, is corrected; the weights of a mean sum to 1."""
        if not plain(linear, nn.Linear):
            return self(linear(x_BTC))
        out, bias = linear(self(x_BTC)), linear.bias
        if self.rest_BN is not None and bias is not None:
            out[:, -1].add_((self.rest_BN.sum(1, keepdim=True) - 1).to(out.dtype) * bias)
        return out

    @property
    def num_left(self) -> int:
        """Number of image tokens after the reduction: K, or K + 1 with a fused token."""
        return self.index_BK.shape[1] + (self.rest_BN is not None)

    def ids(self, ids_BN: Tensor) -> Tensor:
        """Select the ids of the remaining tokens, (B, K); -1 for a fused token or padding."""
        kept_BK = ids_BN.gather(1, self.index_BK)
        if self.sizes_BT is not None:  # a token of size 0 is padding
            kept_BK = torch.where(self.sizes_BT[:, self.num_prefix :] > 0, kept_BK, -1)
        return kept_BK if self.rest_BN is None else F.pad(kept_BK, (0, 1), value=-1)

    def positions(self, rope_B1ND: Any) -> Any:
        """Rotary positions of the remaining tokens: a fused one has its heaviest member's."""
        if rope_B1ND is None:
            return None
        index_BK = self.index_BK
        if self.rest_BN is not None:
            index_BK = torch.cat([index_BK, self.rest_BN.argmax(1, keepdim=True)], 1)
        return pick(rope_B1ND[:, 0].expand(len(index_BK), -1, -1), index_BK)[:, None]

    def hosts(self, num_tokens: int) -> Tensor:
        """Index of the new image token that contains each of N old ones, (B, N); -1: dropped."""
        if self.host_BN is not None:
            return self.host_BN
        B, K = self.index_BK.shape
        rest = -1 if self.rest_BN is None else K
        return led(self.index_BK.new_full((B, num_tokens), rest), self.index_BK)


def pick(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    return x_BNC.gather(1, index_BK[..., None].expand(-1, -1, x_BNC.shape[2]))


def led(host_BN: Tensor, index_BK: Tensor) -> Tensor:
    """host_BN with token index_BK[b, k] in group k: leaders are members of their own groups."""
    own = torch.arange(index_BK.shape[1], device=index_BK.device).expand_as(index_BK)
    return host_BN.scatter(1, index_BK, own)


def merge_into(
    seen: Seen, index_BK: Tensor, host_BN: Tensor, weight_BN: Tensor, sizes_BN: Tensor | None = None
) -> Reduction:
    """Reduction that merges groups of image tokens into their weighted means; sizes add up.

    index_BK: the leader of each group.
    host_BN: the group of each image token, 0 to K - 1, or -1 to drop it.
    weight_BN: weight of each token in its group, before normalisation; float32.
    sizes_BN: size that each token adds to its group; None: sizes are not tracked."""
    P, groups_K1 = seen.num_prefix, torch.arange(index_BK.shape[1], device=host_BN.device)[:, None]
    member_BKN = (host_BN[:, None] == groups_K1).to(weight_BN.dtype)
    share_BKN = member_BKN * weight_BN[:, None]
    mean_BKN, sizes_BT = share_BKN / share_BKN.sum(2, keepdim=True), None
    if sizes_BN is not None:
        sizes_BK = member_BKN @ sizes_BN[..., None].to(member_BKN.dtype)
        sizes_BT = F.pad(sizes_BK.squeeze(2).clamp(min=1), (P, 0), value=1.0).detach()
    return Reduction(index_BK, P, None, mean_BKN, host_BN, sizes_BT)


def nearest(tokens_BNC: Tensor, index_BK: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Cosine similarity (B, N) of every image token to the most similar kept one, and its position
    in index_BK (B, N); of a kept token 1, and its own."""
    tokens = unit(tokens_BNC, eps)
    cosine_BN, host_BN = (tokens @ pick(tokens, index_BK).mT).max(2)
    return cosine_BN.scatter(1, index_BK, 1.0), led(host_BN, index_BK)


def unit(x_BTC: Tensor, eps: float = 1e-12) -> Tensor:
    """Normalise tokens to length 1 for comparisons, in float32 or wider, without gradients."""
    return F.normalize(x_BTC.detach().to(wide(x_BTC)), dim=-1, eps=eps)


def moved(reduction: Reduction, place_BN: Tensor, num_tokens: int) -> Tensor:
    """Update the token index of each patch by a reduction of num_tokens tokens; -1: dropped."""
    host_BN = reduction.hosts(num_tokens).gather(1, place_BN.clamp(0))
    return torch.where(place_BN >= 0, host_BN, place_BN)


def put_back(x_BTC: Tensor, states: list[Any], num_prefix: int) -> Iterator[Tensor]:
    """Yield dense tokens (B, P + N, C) after each block, given the embedded ones and each block's
    reduction (or None) and tokens: each patch has the token it went into, or its last state."""
    map_BNC = x_BTC[:, num_prefix:]
    n = map_BNC.shape[1]
    place_BN = torch.arange(n, device=map_BNC.device).expand(map_BNC.shape[0], -1)
    for reduction, state in states:
        if reduction is not None:
            place_BN, n = moved(reduction, place_BN, n), reduction.num_left
        tokens = pick(state[:, num_prefix:], place_BN.clamp(0))
        map_BNC = torch.where(place_BN[..., None] >= 0, tokens, map_BNC)
        yield torch.cat([state[:, :num_prefix], map_BNC], 1)
