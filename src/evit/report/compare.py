"""The paper's rows and ours: which of our numbers belongs beside which of the published ones."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from evit.report import paper, tables
from evit.report.found import Found
from evit.report.points import SCRATCH, SHELF, TUNED, Point, told_apart

Row = dict[str, Any]
# conf/model's names of the models in the paper's tables.
SYSTEMS = dict(evit_deit="deit_s", deit="deit_s", evit_lvvit="lvvit_s", lvvit="lvvit_s")
SYSTEMS |= dict(dynamicvit_deit="dynamicvit_deit_s")
TIMM = dict(deit_s="deit_small_patch16", lvvit_s="lvvit_s")
TIMM |= dict(dynamicvit_deit_s="dynamicvit_deit_small_patch16")
TITLES = dict(
    off_the_shelf="Off the shelf: a trained DeiT-S, reorganized without training",
    keep_rate_deit_s="DeiT-S, 300 epochs, 224 px",
    keep_rate_lvvit_s="LV-ViT-S, 300 epochs, 224 px",
    resolution_deit_s="DeiT-S at higher resolutions",
    resolution_lvvit_s="LV-ViT-S at higher resolutions",
    dynamicvit_deit_s="EViT and DynamicViT on DeiT-S",
)


def published() -> dict[str, list[Point]]:
    """The paper's tables: the dense model first."""
    shelf = paper.tables()["off_the_shelf"]
    found = dict(
        off_the_shelf=[
            Point(shelf["model"], row["keep_rate"], None, paper.BASE_SIZE, SHELF, top1=row["top1"])
            for row in shelf["rows"]
        ]
    )
    for row in paper.training_runs():
        base = paper.tables()[f"keep_rate_{row['model'].removeprefix('dynamicvit_')}"]["baseline"]
        point = Point(
            row["model"],
            row["keep_rate"],
            row["fusion"],
            row["img_size"],
            TUNED if row["finetuned"] else SCRATCH,
            row["epochs"],
            row["top1"],
            row.get("top5"),
            row["macs"],
            row["throughput"],
            row["throughput"] / base["throughput"],
            setting=row["model"],
            origin=re.sub("^dynamicvit_", "", row["model"]) if row["finetuned"] else "",
        )
        found.setdefault(row["table"], []).append(point)
    return found


def ours(found: Found) -> dict[str, list[Point]]:
    """Our runs and evaluations, for each data set and image size: "fashion-mnist, 28 px".

    Those on ImageNet are together, whatever their size.
    """
    named: dict[str, list[tuple[str, Point]]] = {}
    devices: dict[str, set[Any]] = {}
    folders = {run.row["setting"]: run.folder for run in reversed(found.runs)}
    for group in tables.settings(found.rows):
        row = group[0]
        point = Point(
            row["model"],
            rate(row["keep_rate"]),
            row["fusion"],
            row["img_size"],
            TUNED if row["from_checkpoint"] else SCRATCH,
            row["epochs"],
            statistics.mean(r["top1"] for r in group),
            statistics.mean(r["top5"] for r in group),
            row["macs"] / 1e9,
            images_per_s=typical([r.get("throughput") for r in group]),
            spread=statistics.stdev(r["top1"] for r in group) if len(group) > 1 else None,
            runs=len(group),
            setting=row["setting"],
            # Of older files, which do not tell: those of one folder, trained for as many epochs.
            recipe=row.get("recipe") or f"{folders[row['setting']]}, {row['epochs']} epochs",
            origin=row.get("started_from") or "",
        )
        devices.setdefault(section(row, row), set()).add((row["device"], row.get("precision")))
        name = canonical(row.get("timm_name") or "")
        named.setdefault(section(row, row), []).append((name, point))
    for result in found.evaluations:
        img_size = result["model"]["img_size"]
        data = result["data"] | dict(data=result["data"]["name"])
        whole = not result.get("config", {}).get("max_val_images")
        shelf = named.setdefault(section(data, dict(img_size=img_size, whole=whole)), [])
        shelf += [("", point) for point in off_the_shelf(result) if ("", point) not in shelf]
    return {
        key: told_apart(with_speeds(found, points, alike=len(devices.get(key, [])) == 1), folders)
        for key, points in named.items()
        if points
    }


def typical(values: list[float | None]) -> float | None:
    """The median of what was measured, which a busy machine moves less than the mean."""
    known = [value for value in values if value]
    return statistics.median(known) if known else None


def off_the_shelf(result: Row) -> list[Point]:
    """The points of an evaluation, if the dense model is one: it was trained at no keep rate."""
    points = [
        Point(
            result["model"]["name"],
            rate(row["keep_rate"]),
            row["fusion"],
            result["model"]["img_size"],
            SHELF,
            None,
            row["top1"],
            row["top5"],
            row["macs"] / 1e9,
            recipe=result.get("checkpoint_sha256", ""),
            origin=result.get("checkpoint_sha256", ""),
        )
        for row in result["settings"]
        if row["selection"] in (None, "attentive") and row["macs"] is not None
    ]
    return points if any(point.dense for point in points) else []


def with_speeds(found: Found, named: list[tuple[str, Point]], alike: bool) -> list[Point]:
    """Points with the speeds of their models, all measured in the same way, or without.

    Those of a benchmark, where models took turns; else those that the runs measured themselves.

    Args:
        alike: all runs had the same device and precision.
    """
    _, speeds = measured(found, named)
    if alike and not any(speeds):
        return [point for _, point in named]
    return [
        replace(
            point,
            images_per_s=speed["images_per_s"] if speed else None,
            speed=speed["speed"] if speed else None,
        )
        for (_, point), speed in zip(named, speeds, strict=True)
    ]


def section(data: Row, row: Row) -> str:
    """What a run is compared within: the data set, and but for ImageNet the image size."""
    if data.get("num_classes") == 1000 and row.get("whole"):
        return "ImageNet"
    return f"{data['data']}, {row['img_size']} px"


def rate(rates: Any) -> float | tuple[float, ...]:
    """One number where all reorganizations have the same."""
    if not isinstance(rates, list):
        return rates
    return tuple(rates) if len(set(rates)) > 1 else rates[0] if rates else 1.0


def canonical(timm_name: str) -> str:
    """The same name for a dense model and its EViT."""
    return re.sub(r"^evit_|_224$", "", timm_name)


def measured(
    found: Found, wanted: Sequence[tuple[str, Point]]
) -> tuple[str, list[dict[str, Any] | None]]:
    """Measured speeds of some settings, all of one device, batch size and precision.

    Args:
        wanted: canonical names and settings.

    Returns:
        How it was measured: of all ways the one that most settings were measured in. For each
        setting images_per_s, speed beside the dense model at the base size, and macs; or None.
    """
    ways: dict[str, dict[Any, Row]] = {}
    for result in found.benchmarks:
        for row in result["rows"]:
            if row["what"] == "inference" and row["compared_with"].endswith(f"={base_size(row)}"):
                way = f"{result['device']}, batch {row['batch_size']:g}, {row['precision']}"
                way += ", torch.compile" if row["compile"] else ""
                dense = row["dense"] or set(row["keep_rate"]) == {1}
                fusion = None if dense else row["fusion"]
                key = canonical(row["model"]), rate(row["keep_rate"]), fusion, row["img_size"]
                speed = dict(images_per_s=row["images_per_s"], speed=row["ratio"])
                ways.setdefault(way, {})[key] = speed | dict(macs=row["macs"] / 1e9)
    keys = [(name, p.rate, p.fusion if p.rest else None, p.img_size) for name, p in wanted]
    best = max(ways, key=lambda way: sum(key in ways[way] for key in keys), default="")
    return best, [ways.get(best, {}).get(key) for key in keys]


def base_size(row: Row) -> int:
    """The size of the dense model that a speed is to be beside: the paper's, for its models."""
    return paper.BASE_SIZE if row["model"] in paper.NAMES else row["img_size"]


def pairs(found: Found, name: str) -> tuple[str, list[tuple[Point, Point | None]]]:
    """Of a table of the paper, each row and ours; and how our speeds were measured.

    A row of ours has None for what has not been run, and is None where nothing has.
    """
    rows = published()[name]
    candidates = ours(found).get("ImageNet", [])
    if name == "off_the_shelf":
        rows = [replace(row, fusion=fusion) for row in rows for fusion in (True, False)]
        rows = [row for row in rows if not (row.dense and not row.fusion)]
    way, speeds = measured(found, [(TIMM[row.model], row) for row in rows])
    matched: list[tuple[Point, Point | None]] = []
    for row, speed in zip(rows, speeds, strict=True):
        own = next((point for point in candidates if same(row, point)), None)
        if speed:
            own = own or replace(row, top1=None, top5=None)
            own = replace(own, **speed)
        matched.append((row, own))
    return way if any(speeds) else "", matched


def same(row: Point, own: Point) -> bool:
    """Whether a run of ours is one of the paper's row."""
    if SYSTEMS.get(own.model) != row.model or own.start != row.start:
        return False
    if row.epochs and not row.epochs <= (own.epochs or 0) <= 1.1 * row.epochs:
        return False  # LV-ViT's 300 epochs are 310 with those of its last learning rate
    fusion = row.dense or row.model.startswith("dynamicvit") or own.fusion == row.fusion
    return fusion and (own.rate, own.img_size) == (row.rate, row.img_size)
