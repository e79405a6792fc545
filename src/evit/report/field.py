"""EViT beside other models: published top-1 against images/s."""

from importlib import resources
from typing import Any

import yaml

from evit.report import compare
from evit.report.charts import MARKERS, NAMES, TOP1, Chart, Series, View, family, label
from evit.report.compare import TIMM
from evit.report.found import Found
from evit.report.points import Point

OTHERS = "other models", "others"  # name and colour
FAMILIES = {"DeiT": ("DeiT", "deit"), "LV-ViT": ("LV-ViT", "lvvit")}


def rows() -> list[dict[str, Any]]:
    """The other models, as in field.yaml."""
    return yaml.safe_load(resources.files("evit.report").joinpath("field.yaml").read_text())


def other_models(found: Found) -> Chart:
    """Published top-1 of other models against images/s, published and, where timed, measured."""
    others = rows()
    points = [
        Point(row["name"], 1.0, None, row.get("img_size", 224), top1=row["top1"]) for row in others
    ]
    names = [compare.canonical(row.get("timm", row["name"])) for row in others]
    own = [
        point
        for name in ("keep_rate_deit_s", "keep_rate_lvvit_s")
        for point in compare.published()[name]
        if point.fusion
    ]
    wanted = [*zip(names, points, strict=True), *((TIMM[p.model], p) for p in own)]
    way, speeds = compare.measured(found, wanted)
    published = [row["throughput"] for row in others] + [p.images_per_s for p in own]
    views = [field_view("published", "images/s (published, GPU)", others, points, own, published)]
    if any(speeds):
        here = [speed and speed["images_per_s"] for speed in speeds]
        views.append(field_view("measured", f"images/s ({way})", others, points, own, here))
    note = (
        "Top-1 of all models and EViT as published, images/s published or measured here by "
        "src/benchmark.py. Published speeds of others are read off the paper's figure."
    )
    return Chart("field", "The field: EViT beside other models", note, views)


def field_view(
    name: str, title: str, facts: list[Any], others: list[Point], own: list[Point], at: list[Any]
) -> View:
    """Other models a series for each family, EViT's keep rates as lines."""
    found: dict[str, Series] = {}
    for i, (point, x) in enumerate(zip([*others, *own], at, strict=True)):
        if x is None or point.top1 is None:
            continue
        evit = i >= len(others)
        if evit:
            key, color, text = f"EViT-{NAMES[point.model]}", family(point), label(point)
        else:
            key, color = FAMILIES.get(facts[i]["family"], OTHERS)
            text = point.model if point.img_size == 224 else f"{point.model} at {point.img_size}"
        marker = MARKERS.get(color, "circle")
        series = found.setdefault(key, Series(key, color, ours=evit, line=evit, marker=marker))
        series.x.append(x)
        series.y.append(point.top1)
        series.labels.append(text)
        series.hover.append(f"{key}: {text}\ntop-1 {point.top1} %\n{x:,.4g} images/s")
    return View(name, title, TOP1, list(found.values()), log_x=True)
