"""Token reducers: one file, one method."""

import inspect
from typing import Any

from evit.reducers.ats import ATS
from evit.reducers.base import KeepRate, Reducer
from evit.reducers.cover import Cover
from evit.reducers.dynamicvit import DynamicViT
from evit.reducers.evit import Drop, EViT, Random
from evit.reducers.mctf import MCTF
from evit.reducers.merge import DiffRate, Merge
from evit.reducers.pitome import PiToMe
from evit.reducers.squeeze import Squeeze
from evit.reducers.tokens import Reduction, Seen, merge_into
from evit.reducers.tome import ToMe

KINDS: list[type[Reducer]] = [
    *(EViT, Drop, Random, Merge, Cover, ToMe, PiToMe, MCTF, Squeeze, ATS, DynamicViT, DiffRate)
]
REDUCERS: dict[str, type[Reducer]] = {kind.name: kind for kind in KINDS} | {"topk": Drop}


def options(kind: type[Reducer]) -> set[str]:
    """The names of the arguments that a reducer takes."""
    named = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [p for base in kind.__mro__ for p in _parameters(base)]
    return {p.name for p in parameters if p.kind in named} - {"self"}


def _parameters(kind: type) -> list[inspect.Parameter]:
    own = kind.__dict__.get("__init__") if issubclass(kind, Reducer) else None
    return list(inspect.signature(own).parameters.values()) if own else []


def make(reducer: str | Reducer, **arguments: Any) -> Reducer:
    """A reducer by its name; one that is made already is taken as it is.

    Raises:
        ValueError: there is no such reducer, or it has no such option.
    """
    if isinstance(reducer, Reducer):
        return reducer
    if reducer not in REDUCERS:
        raise ValueError(
            f"reducer {reducer!r} does not exist: take one of {', '.join(sorted(REDUCERS))}"
        )
    kind = REDUCERS[reducer]
    if unknown := sorted(set(arguments) - options(kind)):
        raise ValueError(
            f"reducer {reducer} has no {', '.join(unknown)}: it takes "
            f"{', '.join(sorted(options(kind)))}"
        )
    return kind(**arguments)


__all__ = [
    *[kind.__name__ for kind in KINDS],
    "KINDS",
    "KeepRate",
    "REDUCERS",
    "Reducer",
    "Reduction",
    "Seen",
    "make",
    "merge_into",
    "options",
]
