"""The published numbers, as data."""

import functools
from importlib import resources
from typing import Any

import yaml

# timm's and our names of the models in the tables.
NAMES = {
    "deit_small_patch16_224": "deit_s",
    "evit_deit_small_patch16": "deit_s",
    "lvvit_s": "lvvit_s",
    "evit_lvvit_s": "lvvit_s",
    "dynamicvit_deit_small_patch16": "dynamicvit_deit_s",
}
MODELS = {"deit_s": "evit_deit_small_patch16", "lvvit_s": "evit_lvvit_s"}
EPOCHS = 300  # of training from scratch
BASE_SIZE = 224  # pixels: of the dense models that the tables compare with


@functools.cache
def tables() -> dict[str, Any]:
    """Every table by its name, as in paper.yaml."""
    text = resources.files("evit.report").joinpath("paper.yaml").read_text()
    return yaml.safe_load(text)


def costs(name: str) -> list[dict[str, Any]]:
    """The published speed and MACs of a model of MODELS, dense models first.

    Each has keep_rate, fusion, img_size, throughput (images/s), macs (of one image, 1e9) and ratio,
    that of its throughput to the dense model's at 224 px.
    """
    keep_rates, resolutions = tables()[f"keep_rate_{name}"], tables()[f"resolution_{name}"]
    base = keep_rates["baseline"]
    rows = [base | dict(fusion=None)]
    if large := resolutions.get("baseline_384"):
        rows.append(large | dict(fusion=None))
    for table in keep_rates, resolutions:
        rows += [row | dict(fusion=False) for row in table.get("drop", [])]
        rows += [row | dict(fusion=True) for row in table["fuse"]]
    return [_cost(row, base) for row in rows]


def cost(model: str, keep_rate: float, fusion: bool | None, img_size: int) -> dict[str, Any] | None:
    """The published speed and MACs of one setting of a timm or of our model, if there are any."""
    name = NAMES.get(model)
    if name == "dynamicvit_deit_s":
        base = tables()["keep_rate_deit_s"]["baseline"]
        rows = [row for row in tables()["dynamicvit_deit_s"]["rows"] if row["model"] == name]
        found = [_cost(row | dict(fusion=fusion), base) for row in rows]
    else:
        found = costs(name) if name else []
    fusion = None if keep_rate == 1 else fusion
    wanted = dict(keep_rate=keep_rate, fusion=fusion, img_size=img_size)
    return next((row for row in found if row.items() >= wanted.items()), None)


@functools.cache
def training_runs() -> tuple[dict[str, Any], ...]:
    """Every trained model of the tables: the table, its model, and the row's numbers.

    Each has keep_rate, fusion (None: the model has no such choice), img_size, finetuned and epochs
    (None: not published). What was put into a trained model without training is left out.
    """
    found: list[dict[str, Any]] = []
    for name, table in tables().items():
        if name == "off_the_shelf":
            continue
        if name == "dynamicvit_deit_s":
            for row in table["rows"]:
                model, fusion = row["model"].removeprefix("evit_"), row["model"] == "evit_deit_s"
                own = dict(model=model, fusion=fusion or None, finetuned=row["pretrained"])
                found.append(row | own | dict(table=name))
            continue
        for key, fusion in dict(baseline=None, baseline_384=None, drop=False, fuse=True).items():
            rows = table.get(key, [])
            for row in rows if isinstance(rows, list) else [rows]:
                finetuned = "pretrain_img_size" in row
                own = dict(model=table["model"], fusion=fusion, finetuned=finetuned)
                epochs = None if finetuned else EPOCHS
                found.append(row | own | dict(table=name, epochs=epochs))
    return tuple(dict(img_size=BASE_SIZE) | row for row in found)


def runs(model: str, epochs: int, **setting: Any) -> list[dict[str, Any]]:
    """The training runs of one setting of a timm or of our model."""
    wanted = dict(model=NAMES.get(model)) | setting
    return [
        row
        for row in training_runs()
        if row.items() >= wanted.items() and row["epochs"] in (None, epochs)
    ]


def _cost(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    return dict(
        keep_rate=row["keep_rate"],
        fusion=row["fusion"],
        img_size=row.get("img_size", BASE_SIZE),
        throughput=row["throughput"],
        macs=row["macs"],
        ratio=row["throughput"] / base["throughput"],
    )
