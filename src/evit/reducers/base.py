"""The interface of a token reducer: `plan` decides where each token of an image goes; schedules.

A plan (a Reduction) is a linear map over the tokens. The framework does the rest: fewer queries,
projecting after the reduction, indices, pictures, MACs, compilation, export.
"""

import inspect
import itertools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from evit.reducers.tokens import Reduction, Seen

KeepRate = float | Sequence[float]


def per_place(keep_rate: Any, count: int) -> tuple[float, ...]:
    """Return keep_rate, a number or one per place, as `count` floats in (0, 1].

    Raises:
        ValueError: a rate is out of range, or there are not `count` of them.
    """
    rates: Any = keep_rate if isinstance(keep_rate, Sequence) else [keep_rate] * count
    fit = all(isinstance(r, Real) and r is not True and 0 < float(r) <= 1 for r in rates)
    if not fit or len(rates) != count:
        raise ValueError(
            f"keep_rate must be in (0, 1], one number or one for each of {count} reorganizations, "
            f"got {keep_rate!r}: 0.7 is the paper's main setting, 1 keeps every token"
        )
    return tuple(float(r) for r in rates)


def keep_rate_at(
    step: int,
    steps_per_epoch: int,
    keep_rate: Sequence[float],
    shrink_start_epoch: int,
    shrink_epochs: int,
) -> tuple[float, ...]:
    """Keep rate of each place at a training step, as EViT's authors anneal it.

    It is 1 before epoch shrink_start_epoch, keep_rate after shrink_epochs more epochs, and in
    between rate + (1 - rate) * (1 + cos(pi * progress)) / 2. Each place moves to its own rate.
    """
    epoch = step // steps_per_epoch
    if epoch < shrink_start_epoch:
        dense = 1.0
    elif epoch >= shrink_start_epoch + shrink_epochs:
        dense = 0.0
    else:
        progress = (step / steps_per_epoch - shrink_start_epoch) / shrink_epochs
        dense = (1 + math.cos(math.pi * progress)) / 2
    return tuple(rate + (1 - rate) * dense for rate in keep_rate)


def options(kind: Any) -> set[str]:
    """Names of the arguments that a reducer takes."""
    inits = [base.__init__ for base in kind.__mro__ if issubclass(base, Reducer)]
    specs = [inspect.getfullargspec(init) for init in inits]
    return {name for s in specs for name in s.args + s.kwonlyargs} - {"self", *kind.fixed}


class Reducer(nn.Module):
    """Base class of all token reducers; a subclass implements `plan`.

    A subclass stores its options as attributes of the same names; `config` reads them.

    Args:
        keep_rate: share of the image tokens kept at each place, in (0, 1]; one number, or one per
            entry of `at`. 1 is the dense model. Default: 0.7.
        at: blocks (0-based) that reduce. Default: a quarter, half and three quarters of the depth
            (3, 6, 9 for DeiT), or every block if the method's own schedule (such as r) is given.
        counts: image tokens left after each place, instead of keep_rate.

    Class attributes:
        name: name of the method for `evit.reduce` and `reducer=`.
        stage: when it plans: "input" (before the block), "attention" (between the block's attention
            and its projection), "residual" (after the attention, before the MLP) or "block" (it
            computes the attention itself, in `through`).
        selects: the remaining tokens are unchanged copies, chosen by the class token's query alone;
            then queries are computed for these tokens only.
        static: token counts do not depend on the image, so the model compiles and exports.
        published_names: prefixes in the authors' checkpoints, and their names here.
    """

    name: ClassVar[str]
    stage: ClassVar[str] = "attention"
    selects: bool = False
    extra: int = 0  # fused tokens that are appended
    static: ClassVar[bool] = True
    proportional: bool = False  # sizes of merged tokens enter the attention of later blocks
    published_names: ClassVar[dict[str, str]] = {}
    schedules: ClassVar[tuple[str, ...]] = ()  # options that replace keep_rate, such as r
    fixed: ClassVar[tuple[str, ...]] = ()  # options of the base class that it does not take
    masked: bool = False  # trains by masking the attention instead of removing tokens: DynamicViT
    multiple = 1  # round token counts up to this: fewer shapes to compile while the rate moves

    def __init__(
        self,
        keep_rate: KeepRate | None = None,
        at: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
    ):
        super().__init__()
        self.wanted_rate: Any = 0.7 if keep_rate is None else keep_rate
        self.given: Any = counts
        self.own = False  # whether the method's own schedule (such as r) is used
        self.at: tuple[int, ...] = () if at is None else tuple(at)
        self.at_default = at is None
        self.num_prefix, self.num_patches = 1, 0  # set by attach
        self.keep_rate: tuple[float, ...] = ()

    def attach(self, model: Any) -> Self:
        """Set the places and create the parameters for a model of known depth and width.

        Raises:
            ValueError: places, rates or counts do not fit the model.
        """
        depth, self.num_prefix = len(model.blocks), model.num_prefix_tokens
        if self.at_default:
            self.at = tuple(range(depth) if self.own else self.quarters(depth))
        if list(self.at) != sorted(set(self.at) & set(range(depth))):
            what = f"ascending block numbers from 0 to {depth - 1}"
            raise ValueError(f"drop_loc or at must be {what}, got {list(self.at)}")
        self.depth, self.num_patches = depth, model.patch_embed.num_patches
        self.num_heads = model.blocks[0].attn.num_heads
        self.build(model.embed_dim)
        if self.given is not None:
            self._check_counts(self.num_patches)
        elif not self.own:
            self.set_keep_rate(self.wanted_rate)
            return self
        left = [self.num_patches, *self.counts(self.num_patches)]
        self.keep_rate = tuple(b / a for a, b in itertools.pairwise(left))
        self.check(self.num_patches)
        return self

    def quarters(self, depth: int) -> list[int]:
        """Default places: the blocks at a quarter, half and three quarters of the depth."""
        return sorted({depth * quarter // 4 for quarter in (1, 2, 3)})

    def build(self, dim: int) -> None:
        """Create the parameters, if the method has any, for tokens of `dim` channels."""

    def set_keep_rate(self, keep_rate: KeepRate) -> None:
        """Use keep_rate, one number or one per place, from the next forward pass on.

        Counts and the method's own schedule no longer apply; default places become EViT's again.

        Raises:
            ValueError: the rate is out of range, or leaves fewer tokens than the reducer can.
        """
        before = self.at, self.keep_rate, self.given, self.own
        if self.own and self.at_default:
            self.at = tuple(self.quarters(self.depth))
        try:
            self.keep_rate = per_place(keep_rate, len(self.at))
            self.given, self.own = None, False
            if self.num_patches:
                self.check(self.num_patches)
        except ValueError:
            self.at, self.keep_rate, self.given, self.own = before
            raise

    def _check_counts(self, n: int) -> None:
        given = list(self.given) if isinstance(self.given, Sequence) else []
        whole = len(given) == len(self.at) and all(isinstance(c, int) and c > 0 for c in given)
        if not whole or given != sorted(given, reverse=True) or max(given, default=0) > n:
            raise ValueError(
                f"counts={self.given} must be the image tokens left after each of {len(self.at)} "
                f"places: whole numbers from {n} to 1, none more than the one before"
            )
        self.given = given

    def check(self, n: int) -> None:
        """Raise a ValueError if the schedule is impossible with n patches."""
        before = [n, *self.counts(n)]
        for i, (place, kept) in enumerate(zip(self.at, self.kept(n), strict=True)):
            tokens, fewest = before[i], self.fewest(before[i])
            where = f"{tokens} tokens at block {place}, where {self.name} leaves at least"
            if self.given is not None and before[i + 1] != self.given[i]:
                way = f"counts={self.given} cannot leave {self.given[i]} of"
                raise ValueError(f"{way} {where} {fewest + self.extra}")
            if kept < fewest:
                way = f"keep_rate {list(self.keep_rate)} leaves {kept} of"
                raise ValueError(f"{way} {where} {fewest}: raise it")

    def fewest(self, n: int) -> int:
        """Smallest number of n image tokens that one place can keep."""
        return 1

    def wanted(self, i: int, n: int) -> int:
        """Number of n image tokens that place number i keeps."""
        if self.given is not None:
            return n if self.given[i] >= n else max(self.given[i] - self.extra, 1)
        return math.ceil(self.keep_rate[i] * n)

    def kept(self, n: int) -> list[int]:
        """Number of image tokens that each place keeps, for n patches; all: it does nothing."""
        kept, others = [], self.num_prefix + self.extra
        for i in range(len(self.at)):
            up = -(-(self.wanted(i, n) + others) // self.multiple) * self.multiple
            kept.append(k := min(up - others, n))
            n = n if k == n else k + self.extra
        return kept

    def counts(self, n: int) -> list[int]:
        """Number of image tokens after each place, for n patches; a fused token counts."""
        left = []
        for k in self.kept(n):
            n = n if k == n else k + self.extra
            left.append(n)
        return left

    def plan(self, i: int, seen: Seen, num_kept: int) -> Reduction:
        """Decide where each token goes, at place number i of `at`."""
        raise NotImplementedError

    def key_bias(self, sizes_BT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Attention bias log(size) of each key (B, 1, 1, T), or None if sizes do not enter it."""
        known = sizes_BT is not None and self.proportional
        return sizes_BT.log().to(dtype)[:, None, None] if known else None  # type: ignore[union-attr]

    def through(self, block: Any, i: int, seen: Seen, num_kept: int) -> tuple[Tensor, Reduction]:
        """Stage "block": return the block's output for the remaining tokens, and the reduction."""
        raise NotImplementedError

    def macs(self, n: int, k: int, dim: int) -> int:
        """Multiply-accumulates of reducing n image tokens to k, by the published convention."""
        return 0

    def config(self) -> dict[str, Any]:
        """Arguments of evit.reduce, except the name, that rebuild this reducer."""
        names = sorted(options(type(self)) - {"keep_rate", "at", "counts"})
        own = {k: getattr(self, k) for k in names if self.own or k not in self.schedules}
        if self.given is not None:
            own |= dict(counts=self.given)
        elif not self.own:
            own = dict(keep_rate=self.keep_rate or self.wanted_rate) | own
        return dict(at=self.at) | {k: v for k, v in own.items() if v is not None}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())
