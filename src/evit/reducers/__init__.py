"""Token reducers: a file for each method and its relatives."""

from typing import Any

from evit.reducers.ats import ATS
from evit.reducers.base import KeepRate, Reducer, keep_rate_at, options
from evit.reducers.cover import Cover
from evit.reducers.dynamicvit import DynamicViT
from evit.reducers.evit import Drop, EViT, Random
from evit.reducers.merge import DiffRate, Merge, Squeeze
from evit.reducers.tokens import Reduction, Seen, merge_into, nearest
from evit.reducers.tome import MCTF, PiToMe, ToMe

ALL: Any = EViT, Drop, Random, Merge, Cover, ToMe, PiToMe, MCTF, Squeeze, ATS, DynamicViT, DiffRate
REDUCERS: dict[str, type[Reducer]] = {kind.name: kind for kind in ALL} | {"topk": Drop}


def make(reducer: str | Reducer, **arguments: Any) -> Reducer:
    """Create a reducer by name, with its options; a Reducer is returned unchanged."""
    if isinstance(reducer, Reducer):
        if given := [name for name, value in arguments.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} is the reducer's: give it where that is made")
        return reducer
    if reducer not in REDUCERS:
        raise ValueError(f"reducer {reducer!r} does not exist: use {', '.join(sorted(REDUCERS))}")
    known = options(REDUCERS[reducer])
    if unknown := ", ".join(sorted({*arguments} - known)):
        raise ValueError(f"reducer {reducer} has no {unknown}: it takes {', '.join(sorted(known))}")
    return REDUCERS[reducer](**arguments)


def take(kwargs: dict[str, Any], reducer: str | Reducer | None) -> Reducer:
    """Create the reducer from a model's arguments, removing those that are its own from kwargs."""
    if reducer is None:
        reducer, kwargs["keep_rate"] = "evit", 1.0
    known = options(REDUCERS[reducer]) if reducer in REDUCERS else {"fusion"}
    own = {name: kwargs.pop(name, None) for name in {"keep_rate", "fusion", *known} - {"at"}}
    own["at" if reducer in REDUCERS else "drop_loc"] = kwargs.pop("drop_loc", None)
    if "fusion" not in known:  # of another method, it has no effect
        del own["fusion"]
    return make(reducer, **{name: value for name, value in own.items() if value is not None})


__all__ = [kind.__name__ for kind in ALL]
__all__ += ["KeepRate", "REDUCERS", "Reducer", "Reduction", "Seen"]
__all__ += ["keep_rate_at", "make", "merge_into", "nearest", "options", "take"]
