"""Charts drawn: by plotly for the page, by matplotlib as SVG and PNG for a paper."""

from html import escape
from pathlib import Path
from typing import Any

import matplotlib
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
# As plotly and as matplotlib name them: not by colour alone are families told apart.
MARKERS = dict(lvvit=("triangle-up", "^"), dynamicvit=("diamond", "D"), others=("circle", "o"))
TICKS = [step * 10**power for power in range(6) for step in (1, 2, 5)]  # of logarithmic axes
LOG = dict(
    type="log", tickvals=TICKS, ticktext=[f"{t // 1000}k" if t > 999 else str(t) for t in TICKS]
)
COLUMN = 3.3  # inches: the width of a paper's column
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


def marker(series: Series) -> tuple[str, str]:
    return ("square", "s") if series.square else MARKERS.get(series.family, ("circle", "o"))


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
    symbol, _ = marker(series)
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
        textposition="top center" if series.ours else "bottom center",
        textfont=dict(size=10, color=color(series)),
        line=dict(
            color=color(series),
            width=2 if series.markers else 1.2,
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
            symbol=symbol if series.ours else f"{symbol}-open",
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
        axes.errorbar(
            series.x,
            series.y,
            yerr=series.spread if any(series.spread) else None,
            elinewidth=0.7,
            capsize=1.5,
            color=color(series),
            linestyle="none" if not series.line else "-" if series.ours else ":",
            linewidth=1 if series.markers else 0.6,
            marker=marker(series)[1] if series.markers else "",
            markerfacecolor=color(series) if series.ours else "white",
            label=series.name.replace("$", r"\$") if named[series.name] is series else None,
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
    """Write the labels that lie neither on one another nor on a point."""
    axes = figure.axes[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    own = [s for s in view.series if s.ours] + [s for s in view.series if not s.ours]
    points = [axes.transData.transform(p) for s in own for p in zip(s.x, s.y, strict=True)]
    taken = [Bbox.from_extents(x - 2, y - 2, x + 2, y + 2) for x, y in points]
    for series in own:
        place: Any = dict(xytext=(0, 3 if series.ours else -3), textcoords="offset points")
        place |= dict(ha="center", va="bottom" if series.ours else "top", fontsize=5.5)
        for x, y, text in zip(series.x, series.y, series.labels, strict=False):
            note = axes.annotate(text.replace("$", r"\$"), (x, y), color=color(series), **place)
            box = note.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0
            if text and inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
            else:
                note.remove()
