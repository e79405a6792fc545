"""The published numbers, as data."""

import functools
from importlib import resources
from typing import Any

import yaml

from evit.report import Row

EPOCHS = 300  # of training from scratch
BASE_SIZE = 224  # pixels: of the dense models that the tables compare with
# Each table has a title and rows.
TABLES: dict[str, Any] = yaml.safe_load((resources.files("evit.report") / "paper.yaml").read_text())
MODEL_LIST: dict[str, Row] = TABLES.pop("models")
# The table names of the models, by their names in conf/model and in timm's registry.
CONF = {name: key for key, model in MODEL_LIST.items() for name in model["conf"]}
NAMES = {name: key for key, model in MODEL_LIST.items() for name in model["timm"]}
MODELS = {key: model["timm"][1] for key, model in MODEL_LIST.items() if len(model["timm"]) == 2}
TITLES = {key: model["title"] for key, model in MODEL_LIST.items()}


@functools.cache
def training_runs() -> tuple[Row, ...]:
    """List every trained model of the tables. fusion: None if dense, or without such a choice;
    epochs: None if not published; ratio: its images/s beside the dense model's at 224 px."""
    return tuple(
        dict(fusion=None, img_size=BASE_SIZE, finetuned=False, top5=None, table=name)
        | dict(epochs=None if row.get("finetuned") else EPOCHS)
        | dict(ratio=row["throughput"] / dense_throughput(row["model"]))
        | row
        for name, table in TABLES.items()
        for row in table["rows"]
        if name != "off_the_shelf"
    )


def dense_throughput(model: str) -> float:
    return TABLES[f"keep_rate_{model.removeprefix('dynamicvit_')}"]["rows"][0]["throughput"]


def costs(name: str) -> list[Row]:
    """List the rows of a model that differ in speed or MACs, dense models first."""
    found: dict[Any, Row] = {}
    for row in training_runs():
        if row["model"] == name:
            found.setdefault((row["keep_rate"], row["fusion"], row["img_size"]), row)
    return sorted(found.values(), key=lambda row: row["fusion"] is not None)


def cost(model: str, keep_rate: float, fusion: bool | None, img_size: int) -> Row | None:
    """Find throughput (images/s), macs (1e9 per image) and ratio of one setting; None: none is."""
    name = NAMES.get(model, "")
    wanted: Row = dict(keep_rate=keep_rate, img_size=img_size)
    wanted |= dict(fusion=None if keep_rate == 1 or name not in MODELS else fusion)
    found = next((row for row in costs(name) if row.items() >= wanted.items()), None)
    return found and wanted | {key: found[key] for key in ("throughput", "macs", "ratio")}


def runs(model: str, epochs: int, **setting: Any) -> list[Row]:
    """List the training runs of one setting of timm's or our model."""
    wanted = (setting | dict(model=NAMES.get(model))).items()
    return [r for r in training_runs() if r.items() >= wanted and r["epochs"] in (None, epochs)]
