"""The interface of a token reducer: `plan` decides where each token of an image goes, as a linear
map over the tokens (a Reduction); the framework does the rest."""

import copy
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


def keep_rate_at(step: int, steps: int, rates: Any, start: int, epochs: int) -> tuple[float, ...]:
    """Keep rate of each place at a training step, with so many steps per epoch: as EViT's authors,
    1 before epoch `start`, then on half a cosine to its final rate in so many `epochs`."""
    epoch, dense = step // steps, 0.0
    if epoch < start:
        dense = 1.0
    elif epoch < start + epochs:
        dense = (1 + math.cos(math.pi * ((step / steps - start) / epochs))) / 2
    return tuple(rate + (1 - rate) * dense for rate in rates)


def options(kind: Any) -> set[str]:
    """Names of the arguments that a reducer takes."""
    specs = [inspect.getfullargspec(b.__init__) for b in kind.__mro__ if issubclass(b, Reducer)]
    return {name for s in specs for name in s.args + s.kwonlyargs} - {"self", *kind.fixed}


class Reducer(nn.Module):
    """Base class of all token reducers; a subclass implements `plan`, and stores its options as
    attributes of the same names.

    keep_rate: share of the image tokens kept at each place, in (0, 1]; one number, or one per entry
    of `at`. 1 is the dense model. Default: 0.7.
    at: blocks (0-based) that reduce. Default: a quarter, half and three quarters of the depth
    (3, 6, 9 for DeiT), or every block if the method's own schedule (such as r) is given.
    counts: image tokens left after each place, instead of keep_rate.
    """

    name: ClassVar[str]  # for `evit.reduce` and `reducer=`
    # When it plans: "input" (before the block), "attention" (between the attention and its
    # projection), "residual" (between attention and MLP), "block" (`through` computes the block).
    stage: str = "attention"
    selects: bool = False  # by the class token's query alone; what is left are unchanged copies
    extra: int = 0  # fused tokens that are appended
    proportional: bool = False  # sizes of merged tokens enter the attention of later blocks
    published_names: ClassVar[dict[str, str]] = {}  # prefixes in the authors' checkpoints: ours
    schedules: ClassVar[tuple[str, ...]] = ()  # options that replace keep_rate, such as r
    fixed: ClassVar[tuple[str, ...]] = ()  # options of the base class that it does not take
    share: float | None = None  # MCTF's own schedule, if it is for the default places too
    masked: bool = False  # trains by masking the attention instead of removing tokens: DynamicViT
    multiple = 1  # round token counts up to this: fewer shapes to compile while the rate moves

    def __init__(self, keep_rate: KeepRate | None = None, at: Any = None, counts: Any = None):
        super().__init__()
        self.keep_rate: Any = 0.7 if keep_rate is None else keep_rate  # attached: one per place
        self.given, self.own = counts, False  # own: the method's own schedule (such as r) is used
        self.at, self.at_default = () if at is None else tuple(at), at is None
        self.num_prefix, self.num_patches = 1, 0  # set by attach

    def attach(self, model: Any) -> Self:
        """Set the places, rates and parameters for a model; ValueError: they do not fit it."""
        self.depth, self.num_patches = len(model.blocks), model.patch_embed.num_patches
        self.num_prefix, self.num_heads = model.num_prefix_tokens, model.blocks[0].attn.num_heads
        self.at = self.places() if self.at_default else self.at
        if list(self.at) != sorted(set(self.at) & set(range(self.depth))):
            what = f"ascending block numbers from 0 to {self.depth - 1}"
            raise ValueError(f"drop_loc or at must be {what}, got {list(self.at)}")
        self.build(model.embed_dim)
        if self.given is None and not self.own:
            self.set_keep_rate(self.keep_rate)
            return self
        n, count = self.num_patches, len(self.at)
        if self.given is not None:
            given = list(self.given) if isinstance(self.given, Sequence) else []
            pairs = itertools.pairwise([n, *given])
            falls = all(isinstance(after, int) and 0 < after <= before for before, after in pairs)
            if len(given) != count or not falls:
                what = f"whole numbers from {n} to 1, one for each of {count} places"
                raise ValueError(f"counts={self.given} must be {what}, none more than the last")
            self.given = given
        self.check(n)
        self.keep_rate = tuple(b / a for a, b in itertools.pairwise([n, *self.counts(n)]))
        return self

    def places(self) -> tuple[int, ...]:
        """The blocks that reduce if `at` is not given."""
        if self.own and self.share is None:
            return tuple(range(self.depth))
        return tuple(sorted({self.depth * quarter // 4 for quarter in (1, 2, 3)}))

    def build(self, dim: int) -> None:
        """Create the parameters, if the method has any, for tokens of `dim` channels."""

    def set_keep_rate(self, keep_rate: KeepRate) -> None:
        """Use keep_rate, one number or one per place, from the next forward pass on, instead of
        counts and the method's own schedule; default places become EViT's again.
        ValueError: the rate is out of range, or leaves fewer tokens than the reducer can."""
        new = copy.copy(self)
        new.given, new.own = None, False
        new.at = new.places() if self.own and self.at_default else self.at
        count = len(new.at)
        rates: Any = keep_rate if isinstance(keep_rate, Sequence) else [keep_rate] * count
        fit = all(isinstance(r, Real) and r is not True and 0 < float(r) <= 1 for r in rates)
        if not fit or len(rates) != count:
            each = f"one number or one for each of {count} reorganizations"
            raise ValueError(f"keep_rate must be in (0, 1], {each}, got {keep_rate!r}")
        new.keep_rate = tuple(map(float, rates))
        new.check(self.num_patches)
        vars(self).update(vars(new))

    def check(self, n: int) -> None:
        """Raise a ValueError if the schedule is impossible with n patches; 0: not known yet."""
        before = [n, *self.counts(n)]
        for i, (place, kept) in enumerate(zip(self.at, self.kept(n), strict=True)):
            count, fewest = self.given[i] if self.given else kept, self.fewest(before[i])
            if n and (kept < fewest or (self.given and count != before[i + 1])):
                how = f"counts={self.given}" if self.given else f"keep_rate {list(self.keep_rate)}"
                where = f"{count} of {before[i]} tokens at block {place}"
                raise ValueError(f"{how} leaves {where}: {self.name} needs {fewest + self.extra}")

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
        if sizes_BT is None or not self.proportional:
            return None
        return sizes_BT.log().to(dtype)[:, None, None]

    def macs(self, n: int, k: int, dim: int) -> int:
        """Multiply-accumulates of reducing n image tokens to k, by the published convention."""
        return 0

    def config(self) -> dict[str, Any]:
        """Arguments of evit.reduce, except the name, that rebuild this reducer."""
        names = sorted(options(type(self)) - {"keep_rate", "at", "counts"})
        own = {k: getattr(self, k) for k in names if self.own or k not in self.schedules}
        rate = self.keep_rate if self.given is None and not self.own else None
        given = dict(at=self.at, keep_rate=rate) | own | dict(counts=self.given)
        return {k: v for k, v in given.items() if v is not None}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())
