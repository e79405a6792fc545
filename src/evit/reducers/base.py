"""What a token reducer is: a plan for a linear map over the tokens of an image.

A reducer decides where each token goes, in `plan`. The framework does the rest: which tokens need
a query, projecting after the reduction, indices, pictures, MACs, compilation, export.
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


def options(kind: type) -> set[str]:
    """The names of the arguments that a reducer takes."""
    inits = [base.__init__ for base in kind.__mro__ if issubclass(base, Reducer)]
    named = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [p for init in inits for p in inspect.signature(init).parameters.values()]
    fixed = {"self", *getattr(kind, "fixed", ())}
    return {p.name for p in parameters if p.kind in named} - fixed


class Reducer(nn.Module):
    """Base of all token reducers; a subclass has to write `plan`.

    A subclass keeps its options as attributes of the same names, so that `config` finds them.

    Args:
        keep_rate: share of the image tokens kept at each place, in (0, 1]; one number, or one for
            each of `at`. 1 is the dense model. Default: 0.7.
        at: blocks (0-based) that reduce; default: a quarter, half and three quarters of the depth,
            which is 3, 6, 9 for DeiT; every block where a schedule of the method's own is given.
        counts: image tokens left after each place; they win over keep_rate, as a schedule of the
            method's own does.

    Class attributes:
        name: what `evit.reduce` and `reducer=` call it.
        stage: when it plans: "input" (before the block), "attention" (between the block's attention
            and its projection) or "residual" (after the attention, before the MLP).
        selects: tokens that are left are copies of tokens, and queries of the class token are
            enough to choose them: only they need a query.
        static: the numbers of tokens do not depend on the image, so that it compiles and exports.
        published_names: prefixes in the authors' checkpoints, and what they are called here.
    """

    name: ClassVar[str]
    stage: ClassVar[str] = "attention"
    selects: bool = False
    extra: int = 0  # tokens appended for those that are left out
    static: ClassVar[bool] = True
    proportional: bool = False  # sizes enter the attention of the blocks that follow
    published_names: ClassVar[dict[str, str]] = {}
    schedules: ClassVar[tuple[str, ...]] = ()  # options that are a schedule of the method's own
    fixed: ClassVar[tuple[str, ...]] = ()  # options of its base that it does not take
    masked: bool = False  # in training no token is removed: see DynamicViT
    multiple = 1  # tokens are rounded up to it: few shapes to compile while the rate moves

    def __init__(
        self,
        keep_rate: KeepRate | None = None,
        at: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
    ):
        super().__init__()
        self.wanted_rate: Any = 0.7 if keep_rate is None else keep_rate
        if isinstance(counts, str) or not isinstance(counts, Sequence | None):
            raise ValueError(
                f"counts={counts!r} must be a list of whole numbers, one for each place"
            )
        self.given = None if counts is None else list(counts)
        self.own = False  # a schedule of the method's own is in force
        self.at: tuple[int, ...] = () if at is None else tuple(at)
        self.at_default = at is None
        self.num_prefix, self.num_patches = 1, 0  # until it is attached
        self.keep_rate: tuple[float, ...] = ()

    def attach(self, model: Any) -> Self:
        """Take the places, and make the parameters, for a ViT whose depth and width are known.

        Raises:
            ValueError: places, rates or counts do not suit the model.
        """
        depth, self.num_prefix = len(model.blocks), model.num_prefix_tokens
        if self.at_default:
            self.at = tuple(range(depth) if self.own else self.quarters(depth))
        if list(self.at) != sorted(set(self.at) & set(range(depth))):
            raise ValueError(
                f"drop_loc or at must be ascending block numbers from 0 to {depth - 1}, "
                f"got {list(self.at)}"
            )
        self.depth, self.num_patches = depth, model.patch_embed.num_patches
        self.num_heads = model.blocks[0].attn.num_heads
        self.build(model.embed_dim)
        if self.own or self.given is not None:
            n = self.num_patches
            if self.given is not None:
                self._check_counts(n)
            left = [n, *self.counts(n)]
            self.keep_rate = tuple(b / a for a, b in itertools.pairwise(left))
            self.check(n)
        else:
            self.set_keep_rate(self.wanted_rate)
        return self

    def quarters(self, depth: int) -> list[int]:
        """The blocks that reduce by default: a quarter, half and three quarters of the depth."""
        return sorted({depth * quarter // 4 for quarter in (1, 2, 3)})

    def build(self, dim: int) -> None:
        """Make the parameters, if there are any, for tokens of `dim` channels."""

    def set_keep_rate(self, keep_rate: KeepRate) -> None:
        """Use keep_rate, one number or one for each place, from the next forward on.

        It ends counts and a schedule of the method's own, and the default places are EViT's again.

        Raises:
            ValueError: it is out of range, or leaves fewer tokens than the reducer can.
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
        assert self.given is not None
        whole = all(isinstance(c, int) and c > 0 for c in self.given)
        if not whole or self.given != sorted(self.given, reverse=True) or self.given[0] > n:
            raise ValueError(
                f"counts={self.given} must be the image tokens left after each place: whole "
                f"numbers from {n} to 1, none more than the one before"
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
        kept, others = [], self.num_prefix + self.extra
        for i in range(len(self.at)):
            up = -(-(self.wanted(i, n) + others) // self.multiple) * self.multiple
            kept.append(k := min(up - others, n))
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

    def config(self) -> dict[str, Any]:
        """Return the arguments of evit.reduce, except the name, that rebuild this reducer."""
        names = sorted(options(type(self)) - {"keep_rate", "at", "counts"})
        own = {k: getattr(self, k) for k in names if self.own or k not in self.schedules}
        if self.given is not None:
            own |= dict(counts=self.given)
        elif not self.own:
            own = dict(keep_rate=self.keep_rate or self.wanted_rate) | own
        return dict(at=self.at) | {k: v for k, v in own.items() if v is not None}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())
