"""Charts drawn: by plotly for the page, by matplotlib as SVG and PNG for a paper."""

from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from evit.report.charts import Chart, Series, View

# Readable on white and on black.
COLORS = dict(deit="#2f86e0", lvvit="#e8743b", dynamicvit="#17a07a", shelf="#9a63d6")
COLORS |= dict(other="#d6498f", others="#7f8b97")
PALETTE = "#2f86e0 #e8743b #17a07a #d6498f #b08d1c #6b8794 #9a63d6 #c2483d #4fa3a5 #8c6d4f".split()
# As matplotlib names plotly's.
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v"}
MARKERS |= {"star": "*", "triangle-left": "<", "triangle-right": ">"}
TICKS = [step * 10**power for power in range(-2, 6) for step in (1, 2, 5)]  # of logarithmic axes
LOG = dict(
    type="log", tickvals=TICKS, ticktext=[f"{t // 1000}k" if t > 999 else f"{t:g}" for t in TICKS]
)
FAINT = 0.35  # opacity of single runs, of which the mean is shown too
COLUMN = 3.3  # inches: the width of a paper's column
LABEL = 5.5  # points: letters of a point's label
# Of a label: points to the right of its point and above it, and which side of it is there.
PLACES = (
    (0, 3, "center", "bottom"),
    (0, -3, "center", "top"),
    (4, 0, "left", "center"),
    (-4, 0, "right", "center"),
    (2, 3, "left", "bottom"),
    (2, -3, "left", "top"),
    (-2, 3, "right", "bottom"),
    (-2, -3, "right", "top"),
)
STYLE: Any = {
    "font.size": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 6,
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "evit",  # the same file each time
}


def color(series: Series) -> str:
    if series.family in COLORS:
        return COLORS[series.family]
    return PALETTE[int(series.family.removeprefix("#")) % len(PALETTE)]


def interactive(chart: Chart) -> dict[str, Any]:
    """The chart for page.js: of each view plotly's traces and layout."""
    views = [dict(name=view.name, **_plotly(view)) for view in chart.views]
    return dict(id=chart.id, views=views)


def _plotly(view: View) -> dict[str, Any]:
    figure = go.Figure(
        [_trace(series) for series in view.series],
        layout=dict(
            template={},
            xaxis=dict(title=dict(text=escape(view.x_title))) | (LOG if view.log_x else {}),
            yaxis=dict(title=dict(text=escape(view.y_title))),
            showlegend=False,  # the page has its own, which wraps
            margin=dict(l=10, r=10, t=10, b=10),
            hovermode="closest",
        ),
    )
    content = figure.to_plotly_json()
    return dict(data=content["data"], layout=content["layout"])


def _trace(series: Series) -> go.Scatter:
    mode = "+".join(
        part
        for part, wanted in dict(
            lines=series.line, markers=series.markers, text=any(series.labels)
        ).items()
        if wanted
    )
    return go.Scatter(
        name=series.name,
        x=series.x,
        y=series.y,
        text=[escape(text) for text in series.labels] or None,
        hovertext=[lines(text) for text in series.hover] or None,
        hoverinfo="text",
        hovertemplate=lines(series.template) + "<extra></extra>" if series.template else None,
        mode=mode,
        textposition="top center",
        opacity=FAINT if series.faint else 1,
        textfont=dict(size=10, color=color(series)),
        line=dict(
            color=color(series),
            width=1 if series.faint else 2,
            dash="solid" if series.ours else "dot",
        ),
        error_y=dict(
            array=series.spread,
            visible=any(series.spread),
            color=color(series),
            thickness=1.2,
            width=4,
        ),
        marker=dict(
            symbol=series.marker + "-open" * (not series.ours),
            size=9 if series.line else 8,
            color=color(series),
            line=dict(color=color(series), width=1.5),
        ),
        cliponaxis=False,
    )


def lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def save(chart: Chart, folder: Path) -> None:
    """CHART-VIEW.svg and .png, one column wide."""
    folder.mkdir(parents=True, exist_ok=True)
    for view in chart.views:
        with matplotlib.rc_context(STYLE):
            figure = _matplotlib(view)
        name = f"{chart.id}-{view.name}".replace("/", "_per_").replace(" ", "_")
        formats: Any = dict(svg=dict(metadata=dict(Date=None)), png=dict(dpi=300))
        for suffix, options in formats.items():
            path = folder / f"{name}.{suffix}"
            with matplotlib.rc_context(STYLE):
                figure.savefig(path, **options)


def _matplotlib(view: View) -> Figure:
    named = {series.name: series for series in view.series}
    columns = 2 if max(map(len, named)) < 24 else 1
    height = 0.7 * COLUMN + 0.13 * len(named) / columns
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    axes = figure.add_subplot()
    for series in view.series:
        style: Any = dict(color=color(series), alpha=FAINT if series.faint else 1)
        axes.plot(
            series.x,
            series.y,
            linestyle="none" if not series.line else "-" if series.ours else ":",
            linewidth=0.5 if series.faint else 1,
            marker=MARKERS[series.marker] if series.markers else "",
            markersize=6 if series.marker == "star" else 4,
            markerfacecolor=color(series) if series.ours else "white",
            label=series.name.replace("$", r"\$") if named[series.name] is series else None,
            **style,
        )
        if any(series.spread):
            axes.errorbar(
                series.x, series.y, series.spread, fmt="none", elinewidth=0.7, capsize=1.5, **style
            )
    if view.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.4g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(view.x_title)
    axes.set_ylabel(view.y_title.replace(" (", "\n(") if len(view.y_title) > 28 else view.y_title)
    figure.legend(loc="outside lower left", ncols=columns)
    _label(figure, view)
    return figure


def _label(figure: Figure, view: View) -> None:
    """Write the labels that find a place where they lie neither on one another nor on a point.

    Of several places that with least of lines and bars behind it.
    """
    axes = figure.axes[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    own = [s for s in view.series if s.ours] + [s for s in view.series if not s.ours]
    own = [s for s in own if any(s.labels)]
    points = [axes.transData.transform(p) for s in own for p in zip(s.x, s.y, strict=True)]
    taken = [Bbox.from_extents(*(point - 2), *(point + 2)) for point in points]
    behind = [_drawn(series, axes) for series in own]
    written: list[tuple[str, Any]] = []

    def cost(box: Bbox) -> int | None:
        inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
        if not inside or any(box.overlaps(other) for other in taken):
            return None
        return sum(int(((p > box.min) & (p < box.max)).all(1).sum()) for p in behind)

    for series in own:
        for x, y, text in zip(series.x, series.y, series.labels, strict=True):
            place: Any = dict(
                xytext=(0, 0), textcoords="offset points", color=color(series), fontsize=LABEL
            )
            note = axes.annotate(text.replace("$", r"\$"), (x, y), **place)
            found = []
            for i, (right, up, ha, va) in enumerate(PLACES):
                note.set(position=(right, up), ha=ha, va=va)
                box = note.get_window_extent(renderer)
                if (hits := cost(box)) is not None:
                    found.append((hits, i, box))
            point = axes.transData.transform((x, y))
            twice = any(text == other and abs(point - p).max() < 3 for other, p in written)
            if twice or not found:
                note.remove()
                continue
            _, i, box = min(found, key=lambda one: one[:2])
            right, up, ha, va = PLACES[i]
            note.set(position=(right, up), ha=ha, va=va)
            taken.append(box)
            written.append((text, point))


def _drawn(series: Series, axes: Any) -> Any:
    """Pixels of the lines between a series' points and of its bars, (N, 2)."""
    points = np.column_stack([series.x, series.y])
    starts, ends = (points[:-1], points[1:]) if series.line else (points[:0], points[:0])
    if any(series.spread):
        bars = np.column_stack([np.zeros(len(points)), series.spread])
        starts, ends = np.r_[starts, points - bars], np.r_[ends, points + bars]
    starts, ends = axes.transData.transform(starts), axes.transData.transform(ends)
    along = np.linspace(0, 1, 200)[:, None, None]
    return (starts + along * (ends - starts)).reshape(-1, 2)
