"""index.html, one file that fetches nothing; and its charts as SVG for a paper.

A chart is a dict of id, title, note and views; a view has its name, titles of the axes x and y,
and data, plotly's traces. page.js shows the traces; `save` draws the same ones by matplotlib.
"""

import base64
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib.style
import pandas as pd
import plotly.offline
from matplotlib.figure import Figure

from evit.report import paper, settings, tables
from evit.report.collect import Found
from evit.report.settings import DENSE, SCRATCH

Chart = dict[str, Any]
TOP1 = "top-1 accuracy (%)"
COSTS = {  # views: column and title of x, then of y
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
MOST = 20_000  # points in all curves of a view
NOTE = (
    "A point for each keep rate; bars: standard deviation over seeds. Images/s are measured by "
    "src/benchmark.py, where models take turns, else by the runs at their end."
)
# Readable on white and on black.
PALETTE = "#2f86e0 #e8743b #17a07a #d6498f #b08d1c #9a63d6 #c2483d #6b8794 #4fa3a5 #8c6d4f".split()
SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v"}
COLUMN = 3.3  # inches: the width of a paper's column
STYLE = Path(__file__).parent / "template/paper.mplstyle"


class Section(NamedTuple):
    """The settings of one data set and image size, which can be compared."""

    table: tables.Table
    charts: list[Chart]
    pictures: dict[str, str]  # data URIs by their captions


class Report(NamedTuple):
    """Everything on the page; `paper` is the chart of ImageNet."""

    sections: list[Section]
    paper: Chart
    papers: list[tables.Table]

    @property
    def charts(self) -> list[Chart]:
        return [self.paper, *(chart for section in self.sections for chart in section.charts)]


def build(content: Found) -> Report:
    """Make the sections of our runs and evaluations, and the comparison with the paper."""
    points, sections = settings.ours(content), []
    for index, (title, own) in enumerate(points.groupby("section", sort=False)):
        made = [] if title == "ImageNet" else [accuracy(f"accuracy-{index}", title, own)]
        made = [c for c in (*made, curves(f"curves-{index}", content, own)) if c["views"]]
        sections.append(Section(tables.all_settings(title, own), made, pictures(content, own)))
    whole = accuracy("imagenet", "ImageNet", points[points.section == "ImageNet"])
    papers = [tables.beside_paper(content, points, name) for name in paper.TABLES]
    return Report(sections, whole, papers)


def html(content: Found, report: Report) -> str:
    """Render the page."""
    loader = jinja2.PackageLoader("evit.report", "template")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        report=report,
        problems=content.problems,
        provenance=tables.provenance(content) if content.runs else "",
        rows=list(content.runs.values()),
        plotly=plotly.offline.get_plotlyjs(),
    )


def pictures(content: Found, points: pd.DataFrame) -> dict[str, str]:
    """Take the picture of the first run of each setting that reduces tokens."""
    sparse = points[points.rate != DENSE].setting
    names = dict(zip(points.setting, line_names(points, all_of_it=True), strict=True))
    return {
        names[run["setting"]]: f"data:image/webp;base64,{base64.b64encode(picture).decode()}"
        for name, run in reversed(content.runs.items())
        if run["setting"] in set(sparse) and (picture := content.pictures.get(name))
    }


def line_names(points: pd.DataFrame, all_of_it: bool = False) -> pd.Series:
    """Name the line of each setting by what differs, without the keep rate and the image size.

    Args:
        all_of_it: add these two, which name the setting.
    """
    model = points.model.replace(paper.TITLES)
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
    parts = parts.loc[:, parts.nunique() > 1]
    differ = pd.Series([", ".join(filter(None, row)) for row in parts.values], points.index, str)
    names = differ.where(differ != "", model)
    if not all_of_it:
        return names
    sizes = points.img_size.map(", {} px".format) if points.img_size.nunique() > 1 else ""
    return names + points.rate.map(", keep rate {}".format).mask(points.rate == DENSE, "") + sizes


def accuracy(key: str, title: str, points: pd.DataFrame) -> Chart:
    """Plot top-1 against the cost of an image; on ImageNet beside the paper's."""
    found, note, whole = points.assign(ours=True), NOTE, title == "ImageNet"
    if whole:
        theirs = settings.published().assign(ours=False)
        found = pd.concat([theirs, found.replace(dict(model=paper.CONF))], ignore_index=True)
        kind = ["ours", *"model reducer rate rest img_size start epochs".split()]
        found = found[found.ours | ~found.duplicated(kind)]
        note = f"Hollow and dotted: the paper. Filled: ours. {note}"
    larger = (found.img_size != paper.BASE_SIZE) & whole
    found["line"] = line_names(found) + larger.map({True: ", higher resolution", False: ""})
    found["style"] = larger.map({True: "markers", False: "lines+markers"})
    found["hover"] = found.rate + found.img_size.map(", {} px".format)
    return chart(key, f"Accuracy against cost, {title}", note, found, COSTS)


def curves(key: str, content: Found, points: pd.DataFrame) -> Chart:
    """Plot how training went: a line for each run, in one colour those of a setting."""
    named = dict(zip(points.setting, line_names(points, all_of_it=True), strict=True))
    rows = [
        row | dict(line=named[run["setting"]], part=f"seed {run['seed']}")
        for name, run in content.runs.items()
        if run["setting"] in named
        for row in content.curves.get(name, [])
    ]
    shown = ["line", "part", "step", *(y for *_, y, _ in CURVES.values())]
    found = pd.DataFrame(rows, columns=shown)
    found = found.assign(ours=True, hover=found.part, style="lines", spread=0.0)
    note = "A line for each run; the runs of a setting have one colour."
    return chart(key, "How training went", note, found, CURVES)


def chart(key: str, title: str, note: str, points: pd.DataFrame, views: Any) -> Chart:
    """Make a chart of the same lines over different axes; leave out views of fewer than 2 points.

    Args:
        points: settings with their line; ours: filled, else hollow as the paper's; style: plotly's
            mode; hover: text of the point; part: of a line, if it has several.
        views: COSTS or CURVES.
    """
    lines, drawn = list(points.line.unique()), []
    for name, (x, x_title, y, y_title) in views.items():
        found = points.assign(x=points[x].astype(float), y=points[y].astype(float))
        found = found.dropna(subset=["x", "y"])
        if len(found) > 1:
            drawn.append(dict(name=name, data=traces(found, lines), x=x_title, y=y_title))
    return dict(id=key, title=title, note=note, views=drawn)


def traces(points: pd.DataFrame, lines: list[str]) -> list[Chart]:
    """Make plotly's traces, in order of x; a line looks the same in all views."""
    made: list[Chart] = []
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


@matplotlib.style.context(STYLE)
def save(chart: Chart, folder: Path) -> None:
    """Write CHART-VIEW.svg for each view of a chart, one column of a paper wide."""
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
