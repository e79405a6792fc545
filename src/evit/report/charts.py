"""The charts of the report: accuracy against cost, reducers, training curves, other models."""

import math
from typing import Any

import pandas as pd

from evit.report import paper, settings
from evit.report.collect import Found, Run
from evit.report.figures import Chart
from evit.report.settings import SCRATCH, label
from evit.report.tables import rate_text, top1_text

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


def line_names(points: pd.DataFrame) -> pd.Series:
    """Name the line of each setting: lines go through settings that differ in keep rate alone."""

    def name(point: Any) -> str:
        parts = [paper.TITLES.get(point.model, point.model)]
        parts += [point.reducer] * (point.reducer not in ("", "evit", "dynamicvit"))
        parts += [point.rest, point.selection]
        parts += [point.start] * (point.start != SCRATCH)
        parts += [f"{point.epochs:.0f} epochs"] * (point.epochs < 300)
        parts += [f"{point.images} images"] * (several_images and bool(point.images))
        return ", ".join(filter(None, [*parts, point.recipe_name]))

    several_images = points.images.nunique() > 1
    return points.apply(name, axis=1)


def names(points: pd.DataFrame) -> pd.Series:
    """Name each setting."""
    sizes = points.img_size.map(", {} px".format) if points.img_size.nunique() > 1 else ""
    rates = points.rate.map(lambda rate: "dense" if rate == 1 else f"keep rate {label(rate)}")
    return line_names(points) + ", " + rates + sizes


def hover(points: pd.DataFrame, names: pd.Series) -> list[str]:
    """All numbers of each point, a line each."""
    found = []
    formats = dict(top5="top-5 {:.2f} %", kl="KL to the dense model {:.4f}")
    formats |= dict(macs="{:.3g} GMACs per image", images_per_s="{:,.4g} images/s")
    formats |= dict(speed="{:.2f} times the dense model's")
    for (_, point), name in zip(points.iterrows(), names, strict=True):
        runs = f" (mean and standard deviation of {point.runs} runs)" if point.runs > 1 else ""
        texts = [name, f"{'' if point.rate == 1 else 'keep rate '}{rate_text(point.rate)}"]
        texts += [f"{point.img_size} px", f"top-1 {top1_text(point)} %{runs}"]
        texts += [text.format(point[key]) for key, text in formats.items() if pd.notna(point[key])]
        found.append("\n".join(texts))
    return found


def plot(chart: Chart, figure: Any, points: pd.DataFrame, ours: bool = True) -> None:
    """Draw lines through points that have columns line, x and y, in order of x."""
    for name, group in points.dropna(subset=["x", "y"]).groupby("line", sort=False):
        group = group.sort_values("x", kind="stable")
        shown = group.get("shown", group.line if ours else group.line + " (paper)")
        spread = group.spread.fillna(0) if ours else None
        mode = group["mode"].iloc[0] if "mode" in group else "lines+markers"
        chart.line(figure, str(name), group.x, group.y, hover(group, shown), spread, ours, mode)


def imagenet(content: Found, points: pd.DataFrame) -> Chart:
    """Top-1 on ImageNet against the cost of an image: the paper's rows, and ours."""
    kind = ["model", "reducer", "rate", "rest", "img_size", "start", "epochs"]
    mine = points[points.section == "ImageNet"]
    mine = mine.assign(model=mine.model.replace(paper.CONF))
    way, _ = settings.measured(content, mine)
    both = {False: settings.published().drop_duplicates(kind)} | ({True: mine} if len(mine) else {})
    chart = Chart(
        "imagenet",
        "ImageNet: accuracy against cost",
        f"Hollow and dotted: published. Filled: ours, where runs on all of ImageNet have finished. "
        f"A point for each keep rate. Our images/s: {way or 'not measured'}.",
    )
    titles = dict(
        macs=("GMACs", "GMACs per image"),
        speed=("speed-up", "images/s (times the dense model's at 224 px)"),
        images_per_s=("images/s", "images/s (paper: GPU; ours: see below)"),
    )
    for cost, (name, title) in titles.items():
        figure = chart.view(name, title, TOP1, log_x=cost != "speed")
        for ours, found in both.items():
            base = found.img_size == paper.BASE_SIZE
            line = line_names(found) + base.map({True: "", False: ", higher resolution"})
            mode = base.map({True: "lines+markers", False: "markers"})
            found = found.assign(x=found[cost], y=found.top1, line=line, mode=mode)
            plot(chart, figure, found, ours)
    return chart


def relative(index: int, points: pd.DataFrame) -> Chart | None:
    """Change of top-1 against cost, each beside its own dense model; the paper's too."""
    chart = Chart(
        f"relative-{index}",
        "Accuracy against cost, beside the dense model",
        "Every model beside its own dense model, so that runs on other data can stand beside the "
        "paper's on ImageNet (hollow). A point for each keep rate. Bars: standard deviation over "
        f"seeds. {SPEED_NOTE}",
    )
    theirs = settings.published()
    theirs = theirs[theirs.table.str.startswith("keep_rate") | theirs.model.str.startswith("dyn")]
    both = {False: changes(theirs), True: changes(points)}
    for name, cost in (("GMACs", "macs"), ("images/s", "images_per_s")):
        found = {
            ours: it.assign(x=100 * it[cost] / it[f"dense_{cost}"]) for ours, it in both.items()
        }
        if found[True].dropna(subset=["x", "y"]).groupby("line").size().gt(1).any():
            title = f"{name} (% of the dense model's)"
            figure = chart.view(name, title, "top-1, change to the dense model (points)")
            for ours, chosen in found.items():
                plot(chart, figure, chosen, ours)
    return chart if chart.views else None


def changes(points: pd.DataFrame) -> pd.DataFrame:
    """Each setting with y, its top-1 beside its dense model's; a line begins with that model."""
    points = settings.with_dense(points).assign(line=line_names(points))
    sparse = points[(points.rate != 1) & (points.dense != -1)]
    made = []
    for (line, dense), group in sparse.groupby(["line", "dense"], sort=False):
        start = points.loc[[dense]].assign(line=line, start=group.start.iloc[0])
        own = {f"dense_{key}": start[key] for key in ("top1", "macs", "images_per_s")}
        made += [start.assign(**own), group]
    found = pd.concat(made) if made else points[:0]
    return found.assign(y=found.top1 - found.dense_top1)


def comparable(points: pd.DataFrame) -> pd.DataFrame:
    """The settings of one training, or of one evaluated checkpoint, that has several reducers."""
    kind = [points.model.map(settings.base), "start", "origin", "recipe", "images", "img_size"]
    return points.groupby(kind, sort=False).filter(
        lambda group: group.reducer[group.rate != 1].nunique() > 1
    )


def reducers(index: int, title: str, points: pd.DataFrame) -> Chart:
    """Accuracy, KL divergence and images/s of comparable settings against GMACs, by reducer."""
    dense = points.rate == 1
    parts = points[["reducer", "rest", "selection"]].mask(dense, "dense")
    for name in ("start", "images", "recipe_name"):
        if points[name].nunique() > 1:
            parts[name] = points[name]
    names = parts.apply(lambda row: ", ".join(dict.fromkeys(filter(None, row))), axis=1)
    chart = Chart(
        f"reducers-{index}",
        "Token reducers",
        f"A line for each reducer on {title}, a point for each keep rate. KL: divergence to the "
        f"dense model's logits, which tells reducers apart on few images. {SPEED_NOTE}",
    )
    titles = dict(top1=("top-1", TOP1), kl=("KL", "KL divergence to the dense model (nats)"))
    titles |= dict(images_per_s=("images/s", "images/s (inference)"))
    for key, (name, y) in titles.items():
        found = points.assign(line=names, x=points.macs, y=points[key])
        if found.y[~dense].notna().any():
            plot(chart, chart.view(name, "GMACs per image", y), found)
    return chart


def other_models(found: Found) -> Chart:
    """Published top-1 of other models against images/s, published and, where timed, measured."""
    others = settings.frame(
        [
            dict(model=row["name"], reducer="", rate=1.0, img_size=row.get("img_size", 224))
            | dict(name=settings.canonical(str(row.get("timm", row["name"]))), top1=row["top1"])
            | dict(images_per_s=row["throughput"])
            | dict(folder=row["family"] if row["family"] in FAMILIES else "other models")
            for row in paper.field()
        ]
    )
    theirs = settings.published()
    fused = theirs[(theirs.rest == "fused") & theirs.table.str.startswith("keep_rate")]
    fused = fused.assign(folder="EViT-" + fused.model.map(paper.TITLES))
    points = pd.concat([others.assign(mode="markers"), fused.assign(mode="lines+markers")])
    points = points.reset_index(drop=True)
    shown = points.folder + ": " + points.model.replace(paper.TITLES)
    points = points.assign(line=points.folder, shown=shown, speed=math.nan)
    way, speeds = settings.measured(found, points)
    chart = Chart(
        "field",
        "The field: EViT beside other models",
        "Top-1 of all models and EViT as published, images/s published or measured here by "
        "src/benchmark.py. Published speeds of others are read off the paper's figure.",
    )
    views = dict(published=("published, GPU", points.images_per_s))
    if speeds.speed.notna().any():
        views["measured"] = f"measured on {way}", speeds.images_per_s
    for name, (how, x) in views.items():
        figure = chart.view(name, f"images/s ({how})", TOP1, log_x=True)
        plot(chart, figure, points.assign(x=x, y=points.top1, images_per_s=x))
    return chart


def curves(index: int, runs: list[Run], names: dict[str, str]) -> Chart | None:
    """Plot how runs went: a line for each setting, the mean of its runs, which are faint.

    Args:
        names: the settings' names, by their hashes.
    """
    note = "A line for each setting; faint: its runs."
    chart = Chart(f"curves-{index}", "How training went", note, names=list(names.values()))
    for view, (metric, title) in CURVES.items():
        lines: dict[str, list[pd.Series]] = {}
        for run in runs:
            curve = pd.Series({row["step"]: row[metric] for row in run.curves if metric in row})
            if len(curve) > 1:
                curve = curve[:: 1 + len(curve) // MAX_POINTS].astype(float)
                curve.name = f"seed {run.row['seed']}"
                lines.setdefault(names[run.row["setting"]], []).append(curve)
        if not lines:
            continue
        figure = chart.view(view, "training step (optimizer updates)", title)
        for name, shown in lines.items():
            if len(shown) > 1:  # over the steps that all have
                mean = pd.concat(shown, axis=1, join="inner").mean(axis=1)
                shown.append(mean.rename(f"mean of {len(shown)} runs"))
            for curve in shown:
                texts = [f"{name}, {curve.name}\nstep {x}\n{y:.4g}" for x, y in curve.items()]
                mode = "lines" if len(curve) > 30 else "lines+markers"
                faint = curve is not shown[-1]
                chart.line(figure, name, curve.index, curve, texts, mode=mode, faint=faint)
    return chart if chart.views else None
