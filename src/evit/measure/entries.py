"""Which models a benchmark times: by the names that users give them, beside their dense model."""

import functools
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import product
from typing import Any

import timm
import torch
import yaml
from torch import nn

import evit
from evit.config import CONF_DIR
from evit.measure.macs import count_macs, count_params
from evit.models import create_model
from evit.models.weights import read_state_dict
from evit.report import paper, results


@dataclass(frozen=True)
class Entry:
    """A model at one setting; a dense one is timm's own, or the LV-ViT that keeps every token.

    Args:
        model: a name of timm's registry or of conf/model, or the path of a run's checkpoint.
        fusion: None is the model's default; so is the reducer None.
    """

    model: str
    keep_rate: float | tuple[float, ...] = 1.0
    fusion: bool | None = None
    img_size: int = paper.BASE_SIZE
    dense: bool = False
    reducer: str | None = None

    def __str__(self) -> str:
        rate = "dense" if self.dense else f"keep_rate={self.keep_rate}"
        names = label(self.model), self.reducer, rate, f"img_size={self.img_size}"
        return " ".join(filter(None, names))


def choose(config: dict[str, Any]) -> dict[Entry, Entry]:
    """The models to time, dense ones first, each with the dense model that it is compared with.

    That has the same image size; beside the paper's numbers it has 224 px, as theirs. Each reduced
    model also has itself with every token kept beside it, so that what its patch embedding and its
    last block save is not taken for the reduction's.
    """
    chosen: list[Entry] = []
    if config["paper"] == "field":
        text = resources.files("evit.report").joinpath("field.yaml").read_text()
        for row in yaml.safe_load(text):
            if "timm" in row:
                size = row.get("img_size", paper.BASE_SIZE)
                chosen.append(Entry(row["timm"], img_size=size, dense=True))
        for name, model in paper.MODELS.items():
            rows = paper.tables()[f"keep_rate_{name}"]["fuse"]
            chosen += [Entry(model, row["keep_rate"], True) for row in rows]
    elif isinstance(config["paper"], str):
        model = paper.MODELS[config["paper"]]
        for row in paper.costs(config["paper"]):
            reduced = Entry(model, row["keep_rate"], row["fusion"], row["img_size"])
            chosen.append(reduced if row["keep_rate"] < 1 else dense(reduced))
    else:
        knobs = (config[name] for name in ("img_sizes", "reducers", "keep_rates", "fusion"))
        for model, (size, reducer, rate, fusion) in product(config["models"], [*product(*knobs)]):
            options = model_options(model)
            model = options["model_name"] if len(options) == 1 else model
            own = "dynamicvit" if "dynamicvit" in options["model_name"] else "evit"
            fuses = (reducer or options.get("reducer", own)) == "evit"
            rate = tuple(rate) if isinstance(rate, list) else rate
            chosen.append(Entry(model, rate, fusion if fuses else None, size, False, reducer))
    return compared(chosen, at_base_size=bool(config["paper"]))


def compared(chosen: Iterable[Entry], at_base_size: bool) -> dict[Entry, Entry]:
    """Entries with the dense models that they are compared with, which are entries too."""
    entries: dict[Entry, Entry] = {}
    for entry in chosen:
        base = dense(entry)
        if at_base_size and entry.model in paper.NAMES:
            base = Entry(base.model, dense=True)
        entries |= {base: base}
        if not entry.dense and not is_own(base):
            entries |= {Entry(entry.model, img_size=base.img_size): base}
        if entry.dense or entry.keep_rate != 1:
            entries |= {entry: base}
    return entries


@functools.cache
def model_options(model: str) -> dict[str, Any]:
    """What create_model takes: model_name, and what conf/model or a run's config.json adds to it.

    Raises:
        ValueError: the run cannot be read.
    """
    options: Any = dict(model_name=model)
    if (path := CONF_DIR / "model" / f"{model}.yaml").is_file():
        options = yaml.safe_load(path.read_text())
        for parent in reversed(options.pop("defaults", [])):
            if parent != "_self_" and isinstance(parent, str):
                options = model_options(parent) | options
    elif source := results.run_config(model):
        options = source["model"] | dict(num_classes=len(read_state_dict(model)["head.weight"]))
    knobs = {"_target_", "pretrained", "keep_rate", "fusion", "img_size"}
    return {k: v for k, v in options.items() if k not in knobs and not f"{v}".startswith("${")}


def label(model: str) -> str:
    """A model's name in tables; of a checkpoint, its run's."""
    folder = results.run_folder(model) if model.endswith(".ckpt") else None
    return folder.name if folder else model


def dense(entry: Entry) -> Entry:
    """The dense model of the same image size."""
    options = model_options(entry.model)
    model = dense_name(entry) if len(options) == 1 else entry.model
    return Entry(model, img_size=entry.img_size, dense=True)


def dense_name(entry: Entry) -> str:
    """The registered name of the entry's dense model."""
    name = model_options(entry.model)["model_name"]
    name = re.sub(r"^(?:evit|dynamicvit)_(deit_\w+_patch16)$", r"\1_224", name)
    return re.sub(r"^(?:evit|dynamicvit)_(lvvit_\w)$", r"\1", name)


def is_own(entry: Entry) -> bool:
    """Whether the entry's registered model is of this package, and not timm's."""
    name = dense_name(entry) if entry.dense else model_options(entry.model)["model_name"]
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("evit.")


def build(entry: Entry) -> nn.Module:
    """The entry's model, with random weights.

    Raises:
        ValueError: there is no such model, or it cannot be served at this setting.
    """
    options = dict(model_options(entry.model)) | dict(img_size=entry.img_size)
    name, own = options.pop("model_name"), options.pop("reducer", None)
    knobs: dict[str, Any] = dict(keep_rate=entry.keep_rate)
    knobs |= {} if entry.fusion is None else dict(fusion=entry.fusion)
    if entry.reducer and (entry.reducer, name[:5]) != ("evit", "evit_"):
        knobs["reducer"] = entry.reducer
    elif own and not entry.reducer:
        if isinstance(own, dict):  # a class of evit.reducers, which results.run_config has checked
            kind = getattr(evit.reducers, own["_target_"].split(".")[-1])  # type: ignore[attr-defined]
            own = kind(**{k: v for k, v in own.items() if k != "_target_"} | knobs)
            knobs = {}
        knobs["reducer"] = own
    try:
        if is_own(entry) and not entry.dense:
            return create_model(name, **(options | knobs))
        try:
            model = create_model(dense_name(entry), **options)
        except TypeError:  # it takes images of any size, and is not told one
            model = create_model(name)
        if entry.dense:
            return model
        reducer = knobs.pop("reducer", "evit")
        if reducer == "evit":
            return evit.reorganize(model, **knobs)
        reduce: Any = evit.reduce  # type: ignore[attr-defined]
        return reduce(model, reducer, **knobs)
    except TypeError as error:
        raise ValueError(f"{entry.model}: {error}") from error


@functools.cache
def facts(entry: Entry) -> dict[str, Any]:
    """What the entry is, its parameters and published MACs; no memory is taken for weights.

    Where no count is published, the MACs are those executed.

    Raises:
        ValueError: build's.
    """
    with torch.device("meta"):
        model: Any = build(entry).requires_grad_(False)
        counted: Any = model
        if entry.dense and not is_own(entry):
            try:  # a ViT has the MACs of its reduced form that keeps every token
                counted = build(Entry(entry.model, img_size=entry.img_size))
            except ValueError:
                counted = None
        rates = getattr(getattr(counted, "reducer", counted), "keep_rate", None) or ()
        try:
            macs = count_macs(counted)
        except (ValueError, AttributeError):
            macs = count_macs(model, entry.img_size, executed=True)
    found = dict(model=label(entry.model), keep_rate=list(rates), params=count_params(model))
    return asdict(entry) | found | dict(macs=macs)
