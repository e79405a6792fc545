"""Token reducers: one file, one method."""

from collections.abc import Sequence
from typing import Any

from evit.reducers.ats import ATS
from evit.reducers.base import KeepRate, Reducer, keep_rate_at, options
from evit.reducers.cover import Cover
from evit.reducers.dynamicvit import DynamicViT
from evit.reducers.evit import Drop, EViT, Random
from evit.reducers.mctf import MCTF
from evit.reducers.merge import DiffRate, Merge
from evit.reducers.pitome import PiToMe
from evit.reducers.squeeze import Squeeze
from evit.reducers.tokens import Reduction, Seen, merge_into, nearest
from evit.reducers.tome import ToMe

KINDS: list[type[Reducer]] = [
    *(EViT, Drop, Random, Merge, Cover, ToMe, PiToMe, MCTF, Squeeze, ATS, DynamicViT, DiffRate)
]
REDUCERS: dict[str, type[Reducer]] = {kind.name: kind for kind in KINDS} | {"topk": Drop}


def make(reducer: str | Reducer, **arguments: Any) -> Reducer:
    """Create a reducer by name; a Reducer is returned unchanged.

    Raises:
        ValueError: no reducer has this name, it does not take an option, or it is made already.
    """
    if isinstance(reducer, Reducer):
        if given := [name for name, value in arguments.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} is the reducer's: give it where that is made")
        return reducer
    if reducer not in REDUCERS:
        names = ", ".join(sorted(REDUCERS))
        raise ValueError(f"reducer {reducer!r} does not exist: take one of {names}")
    kind = REDUCERS[reducer]
    if unknown := ", ".join(sorted(set(arguments) - options(kind))):
        known = ", ".join(sorted(options(kind)))
        raise ValueError(f"reducer {reducer} has no {unknown}: it takes {known}")
    return kind(**arguments)


def take(
    kwargs: dict[str, Any],
    reducer: str | Reducer | None,
    keep_rate: KeepRate | None,
    drop_loc: Sequence[int] | None,
    fusion: bool | None,
) -> Reducer:
    """Create the reducer from a model's arguments, removing its options from kwargs."""
    if reducer is None:
        reducer, keep_rate = "evit", 1.0
    if reducer not in REDUCERS:
        return make(reducer, keep_rate=keep_rate, drop_loc=drop_loc, fusion=fusion)
    known = options(REDUCERS[reducer]) - {"keep_rate", "at"}
    own = {name: kwargs.pop(name) for name in known & set(kwargs)}
    if fusion is not None and "fusion" in known:
        own["fusion"] = fusion
    return make(reducer, keep_rate=keep_rate, at=drop_loc, **own)


__all__ = [kind.__name__ for kind in KINDS]
__all__ += ["KINDS", "KeepRate", "REDUCERS", "Reducer", "Reduction", "Seen"]
__all__ += ["keep_rate_at", "make", "merge_into", "nearest", "options", "take"]
