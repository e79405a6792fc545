"""What a token reducer is: a plan for a linear map over the tokens of an image.

A reducer decides where each token goes; the framework does the rest (which tokens need a query,
projecting after the reduction, indices, pictures, MACs, compilation). Shapes stand in the names:
    B images, H heads, D channels of a head, C channels of a token,
    P prefix tokens (the class token first), N image tokens, T = P + N, K image tokens that are left.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeepRate = float | Sequence[float]


def plain(module: nn.Module, kind: type) -> bool:
    """Whether a module is exactly of a kind, and nothing looks at its inputs, outputs or weights."""
    own = module.__dict__
    return (
        type(module) is kind
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and "forward" not in own
    )


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
    return row_BHT.softmax(-1, dtype=torch.promote_types(row_BHT.dtype, torch.float32))


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
        if weight_BKN is None:
            if num_prefix == 1:
                self.index_BT = F.pad(index_BK + 1, (1, 0))
            else:
                prefix_P = torch.arange(num_prefix, device=index_BK.device)
                prefix_BP = prefix_P.expand(index_BK.shape[0], -1)
                self.index_BT = torch.cat([prefix_BP, index_BK + num_prefix], 1)

    def __call__(self, x_BTC: Tensor) -> Tensor:
        """The tokens that are left, (B, P + K, C)."""
        if self.weight_BKN is not None:
            image = self.weight_BKN.to(x_BTC.dtype) @ x_BTC[:, self.num_prefix :]
            return torch.cat([x_BTC[:, : self.num_prefix], image], 1)
        kept_BTC = x_BTC.gather(1, self.index_BT[:, :, None].expand(-1, -1, x_BTC.shape[2]))
        if self.rest_BN is None:
            return kept_BTC
        weight_B1N = self.rest_BN.to(x_BTC.dtype)[:, None]
        return torch.cat([kept_BTC, torch.bmm(weight_B1N, x_BTC[:, self.num_prefix :])], 1)

    def project(self, linear: nn.Module, x_BTC: Tensor) -> Tensor:
        """self(linear(x)), with the product for the tokens that are left alone.

        The bias counts once for each token of a sum, and once for a mean.
        """
        if not plain(linear, nn.Linear):
            return self(linear(x_BTC))
        out, bias = linear(self(x_BTC)), linear.bias
        if self.rest_BN is not None and bias is not None:
            extra_B1 = self.rest_BN.sum(1, keepdim=True) - 1
            out[:, -1].add_(extra_B1.to(out.dtype) * bias)
        return out

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
        sizes_BK = member_BKN @ sizes_BN[..., None]
        sizes_BT = F.pad(sizes_BK.squeeze(2).clamp(min=1), (P, 0), value=1.0).detach()
    return Reduction(index_BK, P, None, share_BKN / total_BK1, host_BN, sizes_BT)


def split(num_tokens: int, num_prefix: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens at even and at odd positions of the whole sequence: A and B of ToMe.

    Returns: indices of A, of B, and the place of each image token in A and B one after the other.
    """
    first = num_prefix % 2
    a, b = (torch.arange(start, num_tokens, 2, device=device) for start in (first, 1 - first))
    return a, b, torch.cat([a, b]).argsort()


def unit(x_BTC: Tensor, eps: float = 1e-12) -> Tensor:
    """Tokens of length 1, in float32 or wider and without gradients: what choices compare."""
    wide = torch.promote_types(x_BTC.dtype, torch.float32)
    return F.normalize(x_BTC.detach().to(wide), dim=-1, eps=eps)


def per_place(keep_rate: Any, count: int) -> tuple[float, ...]:
    """keep_rate, a number or one for each place, as `count` floats in (0, 1].

    Raises:
        ValueError: it is out of range, or has another number of entries.
    """
    rates = list(keep_rate) if isinstance(keep_rate, Sequence) else [keep_rate] * count
    numbers = all(isinstance(r, Real) and not isinstance(r, bool) for r in rates)
    if isinstance(keep_rate, str) or not numbers or not all(0 < r <= 1 for r in rates):
        raise ValueError(
            f"keep_rate must be in (0, 1], one number or one for each reorganization, "
            f"got {keep_rate!r}: 0.7 is the paper's main setting, 1 keeps every token"
        )
    if len(rates) != count:
        raise ValueError(
            f"keep_rate {list(rates)} has {len(rates)} entries for {count} reorganizations: "
            f"give one number, or {count}"
        )
    return tuple(float(r) for r in rates)


class Reducer(nn.Module):
    """Base of all token reducers; a subclass has to write `plan`.

    Args:
        keep_rate: share of the image tokens kept at each place, in (0, 1]; one number, or one for
            each of `at`. 1 is the dense model. Default: 0.7.
        at: blocks (0-based) that reduce; default: a quarter, half and three quarters of the depth,
            which is 3, 6, 9 for DeiT; every block where a schedule of the method's own is given.
        counts: image tokens left after each place, instead of keep_rate.

    Class attributes:
        name: what `evit.reduce` and `reducer=` call it.
        stage: when it plans: "input" (before the block), "attention" (between the block's attention
            and its projection) or "residual" (after the attention, before the MLP).
        selects: tokens that are left are copies of tokens, and queries of the class token are
            enough to choose them: only they need a query.
        trained: it works on weights that were trained without it.
        static: the numbers of tokens do not depend on the image, so that it compiles and exports.
        published_names: prefixes in the authors' checkpoints, and what they are called here.
    """

    name: ClassVar[str]
    stage: ClassVar[str] = "attention"
    selects: bool = False
    extra: int = 0  # tokens appended for those that are left out
    static: ClassVar[bool] = True
    proportional: bool = False  # sizes enter the attention of the blocks that follow
    needs_class_token: ClassVar[bool] = False
    published_names: ClassVar[dict[str, str]] = {}
    masked: bool = False  # in training no token is removed: see DynamicViT
    multiple = 1  # tokens are rounded up to it: few shapes to compile while the rate moves

    def __init__(
        self,
        keep_rate: KeepRate | None = None,
        at: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
    ):
        super().__init__()
        if counts is not None and keep_rate is not None:
            raise ValueError(f"counts={list(counts)} and keep_rate={keep_rate}: give one of them")
        self.wanted_rate: Any = 0.7 if keep_rate is None else keep_rate
        self.rate_given = keep_rate is not None
        self.given = None if counts is None else list(counts)
        self.own = False  # a schedule of the method's own is in force
        self.at: tuple[int, ...] = () if at is None else tuple(at)
        self.at_default = at is None
        self.num_prefix = 1

    def attach(self, model: Any) -> Self:
        """Take the places, and make the parameters, for a ViT whose depth and width are known.

        Raises:
            ValueError: places, rates or counts do not suit the model.
        """
        depth, self.num_prefix = len(model.blocks), model.num_prefix_tokens
        if self.needs_class_token and not model.has_class_token:
            raise ValueError(
                f"{self.name} needs a class token, and {type(model).__name__} has none"
            )
        if self.at_default:
            self.at = tuple(range(depth) if self.own else self.quarters(depth))
        if list(self.at) != sorted(set(self.at) & set(range(depth))):
            raise ValueError(
                f"drop_loc must be ascending block numbers from 0 to {depth - 1}, "
                f"got {list(self.at)}"
            )
        self.depth, n = depth, model.patch_embed.num_patches
        self.num_heads = model.blocks[0].attn.num_heads
        self.build(model.embed_dim)
        if self.own or self.given is not None:
            if self.given is not None:
                self._check_counts(n)
            left = [n, *self.counts(n)]
            self.keep_rate = tuple(b / a for a, b in itertools.pairwise(left))
        else:
            self.set_keep_rate(self.wanted_rate)
        self.check(n)
        return self

    def quarters(self, depth: int) -> list[int]:
        """The blocks that reduce by default: a quarter, half and three quarters of the depth."""
        return [depth * quarter // 4 for quarter in (1, 2, 3)]

    def build(self, dim: int) -> None:
        """Make the parameters, if there are any, for tokens of `dim` channels."""

    def set_keep_rate(self, keep_rate: KeepRate) -> None:
        """Use keep_rate, one number or one for each place, from the next forward on."""
        at = tuple(self.quarters(self.depth)) if self.own and self.at_default else self.at
        self.keep_rate: tuple[float, ...] = per_place(keep_rate, len(at))
        self.at, self.given, self.own = at, None, False

    def _check_counts(self, n: int) -> None:
        assert self.given is not None
        whole = all(isinstance(c, int) and c > 0 for c in self.given)
        if not whole or self.given != sorted(self.given, reverse=True) or self.given[0] > n:
            raise ValueError(
                f"counts={self.given} must be whole numbers, not rising, from {n} to 1"
            )
        if len(self.given) != len(self.at):
            raise ValueError(
                f"counts={self.given} has {len(self.given)} entries for {len(self.at)} places "
                f"{list(self.at)}: give one for each"
            )

    def check(self, n: int) -> None:
        """Refuse what cannot be served with n patches."""
        tokens = n
        for i, (place, wanted) in enumerate(zip(self.at, self.kept(n), strict=True)):
            if self.given is not None and wanted + self.extra * (wanted < tokens) != self.given[i]:
                raise ValueError(
                    f"counts={self.given}: {self.name} cannot leave {self.given[i]} of {tokens} "
                    f"tokens at block {place}; at least {self.fewest(tokens) + self.extra}"
                )
            if wanted < self.fewest(tokens):
                raise ValueError(
                    f"keep_rate {list(self.keep_rate)} leaves {wanted} of {tokens} tokens at block "
                    f"{place}, where {self.name} leaves at least {self.fewest(tokens)}: raise it"
                )
            tokens = wanted + self.extra * (wanted < tokens)

    def fewest(self, n: int) -> int:
        """The fewest of n image tokens that can be kept at one place."""
        return 1

    def wanted(self, i: int, n: int) -> int:
        """How many of n image tokens place number i keeps."""
        if self.given is not None:
            return n if self.given[i] >= n else max(self.given[i] - self.extra, 1)
        return math.ceil(self.keep_rate[i] * n)

    def kept(self, n: int) -> list[int]:
        """How many of an image's tokens each place keeps, of n patches; all: nothing happens."""
        kept = []
        for i in range(len(self.at)):
            k = self.wanted(i, n)
            if self.multiple > 1:
                others = self.num_prefix + self.extra
                k = min(-(-(k + others) // self.multiple) * self.multiple - others, n)
            kept.append(k)
            n = n if k == n else k + self.extra
        return kept

    def counts(self, n: int) -> list[int]:
        """Image tokens left after each place, a fused token included, of n patches."""
        left = []
        for k in self.kept(n):
            n = n if k == n else k + self.extra
            left.append(n)
        return left

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        """Decide where each token goes, at place number i of `at`."""
        raise NotImplementedError

    def key_bias(self, sizes_BT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """log(size), which the logits of the keys get (ToMe's proportional attention).

        Returns: (B, 1, 1, T), or None where sizes do not enter the attention.
        """
        if sizes_BT is None or not self.proportional:
            return None
        return sizes_BT.log().to(dtype)[:, None, None]

    def through(self, block: Any, i: int, seen: Seen, num_kept: int) -> tuple[Tensor, Reduction]:
        """Stage "block": the residual stream after the attention, reduced; and the reduction."""
        raise NotImplementedError

    def macs(self, n: int, k: int, dim: int) -> int:
        """Products of the reduction itself, from n to k image tokens, by the published count."""
        return 0

    def extra_repr(self) -> str:
        rates = getattr(self, "keep_rate", self.wanted_rate)
        return f"keep_rate={rates}, at={self.at}"
