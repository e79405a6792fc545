"""Figures: plotly's traces for the page, saved with matplotlib as SVG and PNG for a paper."""

import html
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

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
# What a frame of points may leave out. ours: solid and filled, the paper's dotted and hollow; part:
# one of several traces of a line; hover: what is said below the line's name.
POINT = dict(ours=True, part="", style="lines+markers", hover="", spread=0.0)


def chart(
    key: str, title: str, note: str, views: dict[str, tuple[Any, str, str]]
) -> dict[str, Any]:
    """Make figures of the same lines over different axes, for page.js and the page.

    A line has the same colour and marker in all of them.

    Args:
        views: by the names of their buttons: points with line, x, y, and POINT's columns; and the
            axes' titles.
    """
    views = {name: (p.dropna(subset=["x", "y"]), *more) for name, (p, *more) in views.items()}
    names = list(dict.fromkeys(line for points, *_ in views.values() for line in points.line))
    drawn = [
        dict(
            name=name,
            data=traces(points, names),
            layout={
                f"{axis}axis": dict(title=dict(text=literal(t)))
                for axis, t in zip("xy", titles, strict=True)
            },
        )
        for name, (points, *titles) in views.items()
        if len(points)
    ]
    return dict(id=key, title=title, note=note, views=drawn)


def traces(points: pd.DataFrame, names: list[str]) -> list[dict[str, Any]]:
    """Make plotly's traces of lines, each in order of x."""
    points = points.assign(**{k: v for k, v in POINT.items() if k not in points})
    made: list[dict[str, Any]] = []
    for (line, ours, _), group in points.groupby(["line", "ours", "part"], sort=False):
        group = group.sort_values("x", kind="stable")
        number = names.index(line)
        color = PALETTE[number % len(PALETTE)]
        symbol = list(SYMBOLS)[(number + number // len(PALETTE)) % len(SYMBOLS)]
        shown = line if ours else f"{line} (paper)"
        spread = list(group.spread.fillna(0)) if ours else []
        made.append(
            dict(
                type="scatter",
                name=literal(shown),
                legendgroup=literal(shown),
                showlegend=literal(shown) not in {trace["name"] for trace in made},
                x=list(group.x),
                y=list(group.y),
                mode=group["style"].iloc[0],
                hovertext=list(map(literal, group.hover)),
                line=dict(color=color, width=2, dash="" if ours else "dot"),
                marker=dict(symbol=symbol + "-open" * (not ours), size=8, color=color),
                error_y=dict(array=spread, color=color, visible=any(spread)),
                cliponaxis=False,
            )
        )
    return made


def literal(text: str) -> str:
    """Text that plotly takes neither for HTML nor for a formula."""
    return html.escape(text).replace("$", "&#36;").replace("\n", "<br>")


def save(chart: dict[str, Any], folder: Path) -> None:
    """Write CHART-VIEW.svg and .png, one column of a paper wide."""
    folder.mkdir(parents=True, exist_ok=True)
    for view in chart["views"]:
        stem = f"{chart['id']}-{view['name']}".replace("/", "_per_").replace(" ", "_")
        with matplotlib.rc_context(STYLE):
            drawn = draw(view["data"], view["layout"])
            drawn.savefig(folder / f"{stem}.svg", metadata=dict(Date=None))
            drawn.savefig(folder / f"{stem}.png", dpi=300)


def draw(data: list[dict[str, Any]], layout: dict[str, Any]) -> Figure:
    """Draw plotly's traces with matplotlib."""
    shown = [trace["name"] for trace in data if trace["showlegend"]]
    columns = 2 if max(map(len, shown)) < 24 else 1
    size = COLUMN, 0.7 * COLUMN + 0.13 * len(shown) / columns
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for trace in data:
        symbol, hollow, _ = trace["marker"]["symbol"].partition("-open")
        axes.errorbar(
            trace["x"],
            trace["y"],
            trace["error_y"]["array"] or None,
            label=text(trace["name"]) if trace["showlegend"] else None,
            linestyle=(":" if hollow else "-") if "lines" in trace["mode"] else "none",
            marker=SYMBOLS[symbol] if "markers" in trace["mode"] else "",
            color=trace["line"]["color"],
            markerfacecolor="white" if hollow else None,
        )
    axes.set_xlabel(text(layout["xaxis"]["title"]["text"]))
    axes.set_ylabel(text(layout["yaxis"]["title"]["text"]).replace(" (", "\n("))
    figure.legend(loc="outside lower left", ncols=columns)
    return figure


def text(escaped: str) -> str:
    return html.unescape(escaped).replace("$", r"\$")
