"""The charts of the report: plotly's traces for the page, and the same as SVG for a paper."""

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from evit.config import counted
from evit.report import paper, settings
from evit.report.collect import Found
from evit.report.settings import DENSE, SCRATCH

Views = dict[str, tuple[str, str, str, str]]  # by buttons: columns and titles of x and y
TOP1 = "top-1 accuracy (%)"
COSTS = {
    "GMACs": ("macs", "GMACs (per image)", "top1", TOP1),
    "images/s": ("images_per_s", "images/s (inference)", "top1", TOP1),
    "speed-up": ("faster", "speed-up (times the dense model's images/s)", "top1", TOP1),
    "KL": ("macs", "GMACs (per image)", "kl", "KL divergence to the dense model (nats)"),
}
STEP = "training step (optimizer updates)"
CURVES = {
    "top-1": ("step", STEP, "val/top1", "top-1 accuracy, validation (%)"),
    "training loss": ("step", STEP, "train/loss", "training loss (nats)"),
    "keep rate": ("step", STEP, "keep_rate", "keep rate (share of tokens)"),
}
MOST = 20_000  # rows of all curves of a chart
NOTE = (
    "A point for each keep rate, bars: standard deviation over seeds. Images/s of "
    "src/benchmark.py, where models take turns; else what the runs measured at their end."
)
# Readable on white and on black.
PALETTE = "#2f86e0 #e8743b #17a07a #d6498f #b08d1c #9a63d6 #c2483d #6b8794 #4fa3a5 #8c6d4f".split()
SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v"}
COLUMN = 3.3  # inches: the width of a paper's column
STYLE: Any = {
    "font.size": 7,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.fontsize": 6,
    "lines.linewidth": 1,
    "lines.markersize": 4,
    "errorbar.capsize": 1.5,
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "evit",  # the same file each time
}


def line_names(points: pd.DataFrame) -> pd.Series:
    """Name the line of each setting by what differs, but for the keep rate and the image size."""
    model = points.model.map(lambda name: paper.TITLES.get(name, name))
    said = [name in title.lower() for name, title in zip(points.reducer, model, strict=True)]
    parts = pd.DataFrame(
        dict(
            model=model,
            reducer=points.reducer.mask(said, "").mask(points.rate == DENSE, DENSE),
            rest=points.rest,
            selection=points.selection,
            start=points.start.replace(SCRATCH, ""),
            epochs=points.epochs.map(lambda n: f"{n:.0f} epochs" if n < paper.EPOCHS else ""),
            images=points.images.map(lambda text: text and f"{text} images"),
            recipe=settings.recipe_names(points),
        )
    )
    differ = parts.loc[:, parts.nunique() > 1].agg(lambda row: ", ".join(filter(None, row)), axis=1)
    return differ.where(differ != "", model) if len(parts) else model


def names(points: pd.DataFrame) -> pd.Series:
    """Name each setting."""
    sizes = points.img_size.map(", {} px".format) if points.img_size.nunique() > 1 else ""
    rates = points.rate.map(", keep rate {}".format).mask(points.rate == DENSE, "")
    return line_names(points) + rates + sizes


def accuracy(key: str, title: str, points: pd.DataFrame) -> dict[str, Any]:
    """Plot top-1 against the cost of an image; on ImageNet beside the paper's."""
    found, note, whole = points.assign(ours=True), NOTE, title == "ImageNet"
    if whole:
        theirs = settings.published().assign(ours=False)
        found = pd.concat([theirs, found.replace(dict(model=paper.CONF))], ignore_index=True)
        kind = ["ours", *"model reducer rate rest img_size start epochs".split()]
        found = found[found.ours | ~found.duplicated(kind)]
        note = f"Hollow and dotted: the paper. Filled: ours. {note}"
    found["line"] = line_names(found)
    larger = (found.img_size != paper.BASE_SIZE) & whole
    found["line"] += larger.map({True: ", higher resolution", False: ""})
    found["style"] = larger.map({True: "markers", False: "lines+markers"})
    texts = found.rate + found.img_size.map(", {} px, ".format)
    found["hover"] = texts + found.runs.map(lambda runs: counted(runs, "run"))
    return chart(key, f"Accuracy against cost, {title}", note, found, COSTS)


def comparable(points: pd.DataFrame) -> pd.DataFrame:
    """The settings of one training, or of one evaluated checkpoint, that has several reducers."""
    kind = points.assign(
        model=settings.base(points.model), reducer=points.reducer.replace("", None)
    )
    alike = kind.groupby(["model", "start", "origin", "recipe", "images", "img_size"])
    return points[alike.reducer.transform("nunique") > 1]


def curves(key: str, content: Found, points: pd.DataFrame) -> dict[str, Any]:
    """Plot how runs went: a line for each run, alike for the runs of a setting."""
    named = dict(zip(points.setting, names(points), strict=True))
    found = pd.DataFrame(
        [
            row | dict(line=named[run["setting"]], part=f"seed {run['seed']}")
            for name, run in content.runs.items()
            if run["setting"] in named
            for row in content.curves.get(name, [])
        ],
        columns=["line", "part", "step", *(y for *_, y, _ in CURVES.values())],
    )
    found = found.assign(ours=True, hover=found.part, style="lines", spread=0.0)
    note = "A line for each run, in one colour those of a setting."
    return chart(key, "How training went", note, found, CURVES)


def chart(key: str, title: str, note: str, points: pd.DataFrame, views: Views) -> dict[str, Any]:
    """Make a chart of the same lines over different axes, for page.js and `save`.

    A line has the same colour and marker in all of them; a view of fewer than 2 points is left out.

    Args:
        points: settings with line; ours: solid and filled, or the paper's; style, plotly's mode;
            hover, what is said below the line's name; and perhaps part, of a line in several.
    """
    lines, drawn = list(points.line.unique()), []
    for name, (x, x_title, y, y_title) in views.items():
        found = points.assign(x=points[x].astype(float), y=points[y].astype(float))
        found = found.dropna(subset=["x", "y"])
        if len(found) > 1:
            drawn.append(dict(name=name, data=traces(found, lines), x=x_title, y=y_title))
    return dict(id=key, title=title, note=note, views=drawn)


def traces(points: pd.DataFrame, lines: list[str]) -> list[dict[str, Any]]:
    """Make plotly's traces of lines, each in order of x."""
    made: list[dict[str, Any]] = []
    parts = ["line", "ours", *["part"] * ("part" in points)]
    for (line, ours, *_), group in points.sort_values("x", kind="stable").groupby(parts):
        group = group.iloc[:: 1 + len(points) // MOST]
        number, shown = lines.index(line), line if ours else f"{line} (paper)"
        color = PALETTE[number % len(PALETTE)]
        symbol = list(SYMBOLS)[(number + number // len(PALETTE)) % len(SYMBOLS)]
        spread = list(group.spread.fillna(0)) if ours else []
        made.append(
            dict(
                type="scatter",
                name=shown,
                legendgroup=shown,
                showlegend=shown not in {trace["name"] for trace in made},
                x=list(group.x),
                y=list(group.y),
                mode=group["style"].iloc[0],
                hovertext=list(group.hover),
                line=dict(color=color, width=2, dash="" if ours else "dot"),
                marker=dict(symbol=symbol + "-open" * (not ours), size=8, color=color),
                error_y=dict(array=spread, color=color, visible=any(spread)),
                cliponaxis=False,
            )
        )
    return made


@matplotlib.rc_context(STYLE)
def save(chart: dict[str, Any], folder: Path) -> None:
    """Write CHART-VIEW.svg, one column of a paper wide: plotly's traces, drawn by matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    for view in chart["views"]:
        shown = [trace["name"] for trace in view["data"] if trace["showlegend"]]
        columns = 2 if max(map(len, shown)) < 24 else 1
        size = COLUMN, 0.7 * COLUMN + 0.13 * len(shown) / columns
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(xlabel=view["x"], ylabel=view["y"].replace(" (", "\n("))
        for trace in view["data"]:
            symbol, hollow, _ = trace["marker"]["symbol"].partition("-open")
            axes.errorbar(
                trace["x"],
                trace["y"],
                trace["error_y"]["array"] or None,
                label=trace["name"].replace("$", r"\$") if trace["showlegend"] else None,
                linestyle=(":" if hollow else "-") if "lines" in trace["mode"] else "none",
                marker=SYMBOLS[symbol] if "markers" in trace["mode"] else "",
                color=trace["line"]["color"],
                markerfacecolor="white" if hollow else None,
            )
        figure.legend(loc="outside lower left", ncols=columns)
        stem = f"{chart['id']}-{view['name']}".replace("/", "_per_").replace(" ", "_")
        figure.savefig(folder / f"{stem}.svg", metadata=dict(Date=None))
