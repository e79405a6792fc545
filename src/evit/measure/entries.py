"""The models that a benchmark times, each with the dense model that it is compared with."""

import functools
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn

from evit.measure.macs import count_macs, count_params
from evit.models import create_model
from evit.models.registry import NAMES, reduced
from evit.report import paper


@dataclass(frozen=True)
class Entry:
    """A registered model at one setting; fusion and reducer None are its defaults.

    A dense one is timm's own, or the LV-ViT that keeps every token.
    """

    model: str
    keep_rate: float | tuple[float, ...] = 1.0
    fusion: bool | None = None
    img_size: int = paper.BASE_SIZE
    dense: bool = False
    reducer: str | None = None

    def __str__(self) -> str:
        rate = "dense" if self.dense else f"keep_rate={self.keep_rate}"
        names = self.model, self.reducer, rate, f"img_size={self.img_size}"
        return " ".join(filter(None, names))


def choose(config: dict[str, Any]) -> dict[Entry, Entry]:
    """The models of a configuration, or of the paper, each with its dense model; see compared."""
    chosen, table = list[Entry](), config["paper"]
    if table == "field":
        others = [row for row in paper.field() if "timm" in row]
        sizes = [row.get("img_size", paper.BASE_SIZE) for row in others]
        chosen += [dense(Entry(r["timm"], img_size=n)) for r, n in zip(others, sizes, strict=True)]
        for name, model in paper.MODELS.items():
            rows = [row for row in paper.costs(name) if row["fusion"]]
            rates = [row["keep_rate"] for row in rows if row["img_size"] == paper.BASE_SIZE]
            chosen += [Entry(model, rate, True) for rate in rates]
    elif isinstance(table, str):
        for row in paper.costs(table):
            entry = Entry(paper.MODELS[table], row["keep_rate"], row["fusion"], row["img_size"])
            chosen.append(entry if row["keep_rate"] < 1 else dense(entry))
    else:
        knobs = "models", "img_sizes", "reducers", "keep_rates", "fusion"
        for model, size, reducer, rate, fusion in product(*(config[knob] for knob in knobs)):
            model = paper.MODELS.get(paper.CONF.get(model, ""), model)
            fuses = reducer == "evit" if reducer else not model.startswith("dynamicvit")
            rate = tuple(rate) if isinstance(rate, list) else rate
            chosen.append(Entry(model, rate, fusion if fuses else None, size, reducer=reducer))
    return compared(chosen, at_base_size=bool(table))


def compared(chosen: Iterable[Entry], at_base_size: bool) -> dict[Entry, Entry]:
    """Entries with the dense models that they are compared with, which are entries too.

    A dense model has the entry's image size; with at_base_size 224 px, as in the paper. One of
    timm's is followed by this code with every token kept, as its patch embedding and its shorter
    last block are no gain of the reduction.
    """
    entries: dict[Entry, Entry] = {}
    for entry in chosen:
        base = dense(entry)
        if at_base_size and entry.model in paper.NAMES:
            base = replace(base, img_size=paper.BASE_SIZE)
        entries |= {base: base}
        if not entry.dense and base.model not in NAMES:
            entries |= {Entry(entry.model, img_size=base.img_size): base}
        if entry.dense or entry.keep_rate != 1:
            entries |= {entry: base}
    return entries


def dense(entry: Entry) -> Entry:
    """The dense model of the same image size."""
    name = re.sub(r"^(evit|dynamicvit)_", "", entry.model)
    name += "_224" * (name != entry.model and name.startswith("deit"))
    return Entry(name, img_size=entry.img_size, dense=True)


def build(entry: Entry) -> nn.Module:
    """The entry's model, with random weights.

    Raises:
        ValueError: there is no such model, or it cannot be served at this setting.
    """
    knobs: dict[str, Any] = {k: v for k, v in asdict(entry).items() if v is not None}
    name = knobs.pop("model")
    try:
        if knobs.pop("dense"):
            return create_model(name, img_size=entry.img_size)
        return (create_model if name in NAMES else reduced)(name, **knobs)
    except TypeError as error:
        if entry.dense:  # it takes images of any size, and is not told one
            return create_model(name)
        raise ValueError(f"{entry}: {error}") from error


@functools.cache
def facts(entry: Entry) -> dict[str, Any]:
    """The entry, its parameters and published MACs; executed MACs where none are published.

    Raises:
        ValueError: build's.
    """
    with torch.device("meta"):
        model: Any = build(entry).requires_grad_(False)
        try:  # a ViT has the MACs of its reduced form that keeps every token
            counted: Any = build(replace(entry, dense=False)) if entry.dense else model
            macs, rates = count_macs(counted), list(counted.reducer.keep_rate)
        except ValueError:
            macs, rates = count_macs(model, entry.img_size, executed=True), []
    return asdict(entry) | dict(keep_rate=rates, params=count_params(model), macs=macs)
