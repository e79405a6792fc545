"""index.html, one file that fetches nothing: page.js shows charts, views of plotly's traces."""

import jinja2
import pandas as pd
import plotly.offline

from evit.report import Row, paper, tables
from evit.report.collect import Found

TOP1 = "top-1 accuracy (%)"
COSTS = {  # views: column and title of x, then of y
    "GMACs": ("macs", "GMACs (per image)", "top1", TOP1),
    "images/s": ("images_per_s", "images/s (inference)", "top1", TOP1),
    "speed-up": ("faster", "speed-up (times the dense model's images/s)", "top1", TOP1),
}
STEP = "training step (optimizer updates)"
CURVES = {
    "top-1": ("step", STEP, "val/top1", "top-1 accuracy, validation (%)"),
    "training loss": ("step", STEP, "train/loss", "training loss (nats)"),
}
MOST = 20_000  # points in all curves of a view
# Readable on white and on black.
PALETTE = "#2f86e0 #e8743b #17a07a #d6498f #b08d1c #9a63d6 #c2483d #6b8794 #4fa3a5 #8c6d4f".split()
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down"]


def html(content: Found) -> str:
    """Render the page: a section for each data set, then the tables of the paper."""
    points, sections = tables.ours(content), []
    for i, table in enumerate(tables.of_settings(points)):
        title, own = table["title"], points[points.section == table["title"]]
        made = [] if title == "ImageNet" else [accuracy(f"accuracy-{i}", title, own)]
        made = [c for c in (*made, curves(f"curves-{i}", content, own)) if c["views"]]
        named, seen = full_names(own), content.pictures
        pictures = {text: seen[setting] for setting, text in named.items() if setting in seen}
        sections.append(dict(table=table, charts=made, pictures=pictures))
    loader = jinja2.PackageLoader("evit.report", "template")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    whole = accuracy("imagenet", "ImageNet", points[points.section == "ImageNet"])
    shown = dict(sections=sections, paper=whole, papers=tables.of_paper(content, points))
    shown |= dict(rows=[*content.runs.values()], labels=[*tables.LABELS.values()])
    shown |= dict(problems=content.problems, provenance=tables.provenance(content))
    return environment.get_template("page.html").render(shown, plotly=plotly.offline.get_plotlyjs())


def full_names(points: pd.DataFrame) -> dict[str, str]:
    sizes = points.img_size.map(", {} px".format) if points.img_size.nunique() > 1 else ""
    rates = points.rate.map(", keep rate {}".format).mask(points.rate == tables.DENSE, "")
    return dict(zip(points.setting, line_names(points) + rates + sizes, strict=True))


def line_names(points: pd.DataFrame) -> pd.Series:
    """Name the line of each setting by what differs, without the keep rate and the image size."""
    parts = tables.labels(points).drop(columns=["keep rate", "px", "runs"])
    models, epochs = parts.model, points.epochs.where(points.epochs < paper.EPOCHS)
    parts = parts.replace(dict(kept=dict(attentive=""), weights={tables.SCRATCH: ""}))
    parts["reducer"] = parts.reducer.mask(points.rate == tables.DENSE, tables.DENSE)
    parts["epochs"] = tables.texts(epochs, "{:.0f} epochs")
    parts["images"] = points.images.where(points.images == "", points.images + " images")
    parts = parts.loc[:, parts.nunique() > 1]
    names = [", ".join(dict.fromkeys(filter(None, row))) for row in parts.values]
    differ = pd.Series(names, points.index, str)
    return differ.where(differ != "", models)


def accuracy(key: str, title: str, points: pd.DataFrame) -> Row:
    """Plot top-1 against the cost of an image; on ImageNet beside the paper's."""
    found, whole = points.assign(ours=True), title == "ImageNet"
    if whole:
        kind = "model reducer rate rest img_size start epochs".split()
        theirs = tables.published().drop_duplicates(kind).assign(ours=False)
        found = pd.concat([theirs, found.replace(dict(model=paper.CONF))], ignore_index=True)
    larger = (found.img_size != paper.BASE_SIZE) & whole
    found["line"] = line_names(found) + larger.map({True: ", higher resolution", False: ""})
    found["style"] = larger.map({True: "markers", False: "lines+markers"})
    found = found.assign(part="", hover=found.rate + found.img_size.map(", {} px".format))
    return chart(key, f"Accuracy against cost, {title}", found, COSTS)


def curves(key: str, content: Found, points: pd.DataFrame) -> Row:
    """Plot how training went: a line for each run, in one colour those of a setting."""
    named = full_names(points)
    rows = [
        row | dict(line=named[run["setting"]], part=f"seed {run['seed']}")
        for name, run in content.runs.items()
        if run["setting"] in named
        for row in content.curves.get(name, [])
    ]
    found = pd.DataFrame(rows, columns=["line", "part", "step", "val/top1", "train/loss"])
    found = found.assign(hover=found.part, ours=True, style="lines", spread=0.0)
    return chart(key, "How training went", found, CURVES)


def chart(key: str, title: str, points: pd.DataFrame, views: Row) -> Row:
    """Make a chart of the same lines over different axes: a line of points for each line and part,
    in its style (plotly's mode); the paper's are hollow. A view of fewer than two is left out."""
    lines, drawn = list(points.line.unique()), []
    for view, (x, x_title, y, y_title) in views.items():
        shown, traces = points.dropna(subset=[x, y]).sort_values(x, kind="stable"), list[Row]()
        for (line, ours, _), group in shown.groupby(["line", "ours", "part"]):
            group = group.iloc[:: 1 + len(shown) // MOST]
            number, name = lines.index(line), line if ours else f"{line} (paper)"
            color = PALETTE[number % len(PALETTE)]
            symbol = SYMBOLS[(number + number // len(PALETTE)) % len(SYMBOLS)]
            spread = list(group.spread.fillna(0)) if ours else []
            again = any(trace["name"] == name for trace in traces)
            traces.append(
                dict(type="scatter", name=name, legendgroup=name, showlegend=not again)
                | dict(x=list(group[x]), y=list(group[y]), hovertext=list(group.hover))
                | dict(mode=group["style"].iloc[0], cliponaxis=False)
                | dict(line=dict(color=color, width=2, dash="" if ours else "dot"))
                | dict(marker=dict(symbol=symbol + "-open" * (not ours), size=8, color=color))
                | dict(error_y=dict(array=spread, color=color, visible=any(spread)))
            )
        if len(shown) > 1:
            drawn.append(dict(name=view, data=traces, x=x_title, y=y_title))
    return dict(id=key, title=title, views=drawn)
