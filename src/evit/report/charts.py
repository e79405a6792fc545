"""The charts of the report: accuracy against cost, reducers, training curves, other models."""

from typing import Any

import pandas as pd

from evit.config import counted
from evit.report import paper, settings
from evit.report.collect import Found, Run
from evit.report.figures import chart
from evit.report.settings import SCRATCH
from evit.report.tables import rate_text

TOP1 = "top-1 accuracy (%)"
SPEED_NOTE = (
    "Images/s of src/benchmark.py, where models take turns; else what the runs measured at their "
    "end, the median over seeds."
)
MAX_POINTS = 400  # of a curve
CURVES = {
    "top-1": ("val/top1", "top-1 accuracy, validation (%)"),
    "training loss": ("train/loss", "training loss (nats)"),
    "validation loss": ("val/loss", "validation loss (nats)"),
    "keep rate": ("keep_rate", "keep rate (share of tokens)"),
    "tokens": ("tokens_per_image", "image tokens of a block, mean (tokens)"),
    "learning rate": ("lr", "learning rate (1 per step)"),
}
FAMILIES = ("DeiT", "LV-ViT")  # of the other models: lines of their own
COSTS = {"GMACs": ("macs", "per image"), "images/s": ("images_per_s", "paper: GPU")}
COSTS |= {"speed-up": ("speed", "times the dense model's images/s at 224 px")}
KIND = ["model", "reducer", "rate", "rest", "img_size", "start", "epochs"]
Views = dict[str, tuple[Any, ...]]


def line_names(points: pd.DataFrame) -> pd.Series:
    """Name the line of each setting: lines go through settings that differ in keep rate alone."""
    several_images = points.images.nunique() > 1

    def name(point: Any) -> str:
        parts = [paper.TITLES.get(point.model, point.model)]
        parts += [point.reducer] * (point.reducer not in ("evit", "dynamicvit"))
        parts += [point.rest, point.selection, point.start.replace(SCRATCH, "")]
        parts += [counted(int(point.epochs), "epoch")] if point.epochs < 300 else []
        parts += [f"{point.images} images"] * (several_images and bool(point.images))
        return ", ".join(filter(None, [*parts, point.recipe_name]))

    return pd.Series([name(point) for _, point in points.iterrows()], points.index, dtype=object)


def names(points: pd.DataFrame) -> pd.Series:
    """Name each setting."""
    sizes = points.img_size.map(", {} px".format) if points.img_size.nunique() > 1 else ""
    rates = points.rate.map(lambda r: "dense" if r == 1 else f"keep rate {settings.label(r)}")
    return line_names(points) + ", " + rates + sizes


def lines(points: pd.DataFrame) -> pd.DataFrame:
    """Settings with line and hover, what is said of each beside its x and y."""
    texts = points.rate.map(rate_text) + points.img_size.map(", {} px, ".format)
    texts += points.runs.map(lambda runs: counted(runs, "run"))
    return points.assign(line=line_names(points), hover=texts)


def costs(key: str, title: str, content: Found, points: pd.DataFrame) -> dict[str, Any]:
    """Top-1 against the cost of an image, and the paper's: on ImageNet as it is.

    On other data each setting, ours and the paper's, is beside its own dense model.
    """
    theirs, whole = settings.published().drop_duplicates(KIND), title == "ImageNet"
    if whole:
        way, _ = settings.measured(content, points)
        both = [lines(theirs), lines(points.assign(model=points.model.replace(paper.CONF)))]
        note = f"Our images/s: {way or 'not measured'}."
    else:
        scratch = theirs.table.str.startswith("keep_rate") | theirs.model.str.startswith("dyn")
        both = [changes(theirs[scratch]), changes(points)]
        note = f"Bars: standard deviation over seeds. {SPEED_NOTE}"
    found = pd.concat([both[0].assign(ours=False), both[1].assign(ours=True)])
    larger = (found.img_size != paper.BASE_SIZE) & whole
    found["line"] += larger.map({True: ", higher resolution", False: ""})
    found["style"] = larger.map({True: "markers", False: "lines+markers"})
    views: Views = {}
    for name, (cost, unit) in COSTS.items():
        if whole:
            views[name] = found.assign(x=found[cost], y=found.top1), f"{name} ({unit})", TOP1
        elif cost != "speed":
            share = 100 * found[cost] / found[f"dense_{cost}"]
            shown = found.assign(x=share, y=found.top1 - found.dense_top1)
            own = shown[shown.ours].dropna(subset=["x", "y"])
            if own.groupby("line").size().gt(1).any():
                y = "top-1, change to the dense model (points)"
                views[name] = shown, f"{name} (% of the dense model's)", y
    note = f"Hollow and dotted: the paper. Filled: ours. A point for each keep rate. {note}"
    return chart(key, f"Accuracy against cost, {title}", note, views)


def changes(points: pd.DataFrame) -> pd.DataFrame:
    """Each reduced setting that has a dense model; a line begins with that model."""
    points = lines(settings.with_dense(points))
    sparse = points[(points.rate != 1) & (points.dense != -1)]
    made = [points[:0]]
    for (line, dense), group in sparse.groupby(["line", "dense"], sort=False):
        start = points.loc[[dense]].assign(line=line)
        own = {f"dense_{key}": start[key] for key in ("top1", "macs", "images_per_s")}
        made += [start.assign(**own), group]
    return pd.concat(made)


def comparable(points: pd.DataFrame) -> pd.DataFrame:
    """The settings of one training, or of one evaluated checkpoint, that has several reducers."""
    kind = [points.model.map(settings.base), "start", "origin", "recipe", "images", "img_size"]
    return points.groupby(kind, sort=False).filter(
        lambda group: group.reducer[group.rate != 1].nunique() > 1
    )


def reducers(index: int, title: str, points: pd.DataFrame) -> dict[str, Any]:
    """Accuracy, KL divergence and images/s of comparable settings against GMACs, by reducer."""
    dense = points.rate == 1
    parts = points[["reducer", "rest", "selection"]].mask(dense, "dense")
    for name in ("start", "images", "recipe_name"):
        if points[name].nunique() > 1:
            parts[name] = points[name]
    named = parts.apply(lambda row: ", ".join(dict.fromkeys(filter(None, row))), axis=1)
    found = lines(points).assign(line=named, x=points.macs)
    titles = dict(top1=("top-1", TOP1), kl=("KL", "KL divergence to the dense model (nats)"))
    titles |= dict(images_per_s=("images/s", "images/s (inference)"))
    return chart(
        f"reducers-{index}",
        "Token reducers",
        f"A line for each reducer on {title}, a point for each keep rate. KL: divergence to the "
        f"dense model's logits, which tells reducers apart on few images. {SPEED_NOTE}",
        {
            name: (found.assign(y=found[key]), "GMACs (per image)", y)
            for key, (name, y) in titles.items()
            if found[key][~dense].notna().any()
        },
    )


def other_models(found: Found) -> dict[str, Any]:
    """Published top-1 of other models against images/s, published and, where timed, measured."""
    others = settings.frame(
        [
            dict(model=row["name"], img_size=row.get("img_size", 224), top1=row["top1"])
            | dict(name=settings.canonical(str(row.get("timm", row["name"]))))
            | dict(images_per_s=row["throughput"])
            | dict(folder=row["family"] if row["family"] in FAMILIES else "other models")
            for row in paper.field()
        ]
    )
    theirs = settings.published()
    fused = theirs[(theirs.rest == "fused") & theirs.table.str.startswith("keep_rate")]
    fused = fused.assign(folder="EViT-" + fused.model.map(paper.TITLES), style="lines+markers")
    points = pd.concat([others.assign(style="markers"), fused], ignore_index=True)
    texts = points.model.replace(paper.TITLES) + ", " + points.rate.map(rate_text)
    points = points.assign(line=points.folder, y=points.top1, hover=texts)
    way, speeds = settings.measured(found, points)
    views: Views = {}
    for name, how, x in (
        ("published", "published, GPU", points.images_per_s),
        ("measured", f"measured on {way}", speeds.images_per_s),
    ):
        views[name] = points.assign(x=x), f"images/s ({how})", TOP1
    return chart(
        "field",
        "The field: EViT beside other models",
        "Top-1 of all models and EViT as published, images/s published or measured here by "
        "src/benchmark.py. Published speeds of others are read off the paper's figure.",
        views,
    )


def curves(index: int, runs: list[Run], names: dict[str, str]) -> dict[str, Any]:
    """Plot how runs went: a line for each run, alike for the runs of a setting.

    Args:
        names: the settings' names, by their hashes.
    """
    keys = ["line", "part", "step"]
    steps = pd.DataFrame(
        [
            row | dict(line=names[run.row["setting"]], part=f"seed {run.row['seed']}")
            for run in runs
            for row in run.curves
        ],
        columns=[*keys, *(metric for metric, _ in CURVES.values())],
    )
    views: Views = {}
    for view, (metric, title) in CURVES.items():
        found = steps.assign(x=steps.step, y=steps[metric].astype(float)).dropna(subset="y")
        found = found.drop_duplicates(keys, keep="last")
        parts = found.groupby(keys[:2])
        size = parts.y.transform("size")
        found = found[(size > 1) & (parts.cumcount() % (1 + size // MAX_POINTS) == 0)]
        found = found.assign(hover=found.part, style="lines")
        views[view] = found, "training step (optimizer updates)", title
    note = "A line for each run, in one colour those of a setting."
    return chart(f"curves-{index}", "How training went", note, views)
