"""The models of a benchmark, each with its dense baseline."""

import functools
import json
import re
from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from torch import nn

from evit.measure import count_macs, count_params
from evit.models import create_model
from evit.models.registry import NAMES, reduced
from evit.report import paper


class Entry(NamedTuple):
    """One model at one setting; fusion=None and reducer=None are the model's defaults.

    Args:
        dense: timm's own model, or the LV-ViT that keeps every token.
        options: further arguments of the model as JSON; `reducer` as in conf/reducer.
    """

    model: str
    keep_rate: float | tuple[float, ...] = 1.0
    fusion: bool | None = None
    img_size: int = paper.BASE_SIZE
    dense: bool = False
    reducer: str | None = None
    options: str = "{}"

    def __str__(self) -> str:
        rate = "dense" if self.dense else f"keep_rate={self.keep_rate}"
        names = self.model, self.reducer, rate, f"img_size={self.img_size}"
        return " ".join(filter(None, names))


def choose(config: dict[str, Any]) -> dict[Entry, Entry]:
    """Models of a configuration, or of the paper, each with its dense baseline (see compared).

    config["models"] are pairs (name, options); config["reducers"] maps names to conf/reducer.
    """
    chosen, table = list[Entry](), config["paper"]
    if isinstance(table, str):
        for row in paper.costs(table):
            entry = Entry(paper.MODELS[table], row["keep_rate"], row["fusion"], row["img_size"])
            chosen.append(entry if row["keep_rate"] < 1 else dense(entry))
    else:
        knobs = [config[k] for k in ("models", "img_sizes", "reducers", "keep_rates", "fusion")]
        for (model, options), size, name, rate, fusion in product(*knobs):
            node = config["reducers"][name]
            fuses = "fusion" in node if name else not model.startswith("dynamicvit")
            rate = tuple(rate) if isinstance(rate, list) else rate
            options = json.dumps(options | (dict(reducer=node) if name else {}))
            chosen.append(Entry(model, rate, fusion if fuses else None, size, False, name, options))
    return compared(chosen, at_base_size=bool(table))


def compared(chosen: Iterable[Entry], at_base_size: bool) -> dict[Entry, Entry]:
    """Map each entry to its dense baseline; baselines are entries too.

    A baseline has the entry's image size, or 224 px with at_base_size (as in the paper). After a
    baseline of timm's, add our model with every token kept: its faster patch embedding and shorter
    last block are not gains of the reduction.
    """
    entries: dict[Entry, Entry] = {}
    for entry in chosen:
        base = dense(entry)
        if at_base_size and entry.model in paper.NAMES:
            base = base._replace(img_size=paper.BASE_SIZE)
        entries |= {base: base}
        if not entry.dense and base.model not in NAMES:
            entries |= {base._replace(model=entry.model, dense=False): base}
        if entry.dense or entry.keep_rate != 1:
            entries |= {entry: base}
    return entries


def dense(entry: Entry) -> Entry:
    """The dense baseline at the same image size."""
    name = re.sub(r"^(evit|dynamicvit)_", "", entry.model)
    name += "_224" * (name != entry.model and name.startswith("deit"))
    options = {k: v for k, v in json.loads(entry.options).items() if k != "reducer"}
    return Entry(name, img_size=entry.img_size, dense=True, options=json.dumps(options))


def build(entry: Entry) -> nn.Module:
    """Build the entry's model with random weights; a ValueError if it refuses the options."""
    knobs: dict[str, Any] = dict(keep_rate=entry.keep_rate, fusion=entry.fusion)
    knobs = {k: v for k, v in knobs.items() if v is not None and not entry.dense}
    options = json.loads(entry.options)
    if node := options.get("reducer"):
        own = {k: v for k, v in knobs.items() if k in node}
        knobs = dict(reducer=instantiate(node | own, _convert_="all"))
    make = create_model if entry.dense or entry.model in NAMES else reduced
    try:
        return make(entry.model, img_size=entry.img_size, **options | knobs)
    except TypeError as error:
        raise ValueError(f"{entry}: {error}") from error


@functools.cache
def facts(entry: Entry) -> dict[str, Any]:
    """The entry with its parameters and published MACs; a baseline counts every token as kept."""
    with torch.device("meta"):
        model: Any = build(entry)
        counted: Any = build(entry._replace(dense=False)) if entry.dense else model
    row = entry._asdict() | dict(keep_rate=list(counted.reducer.keep_rate))
    del row["options"]
    return row | dict(params=count_params(model), macs=count_macs(counted))
