"""Figures: built with plotly for the page, saved with matplotlib as SVG and PNG for a paper."""

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import plotly.graph_objects as go
from matplotlib.figure import Figure

# Readable on white and on black.
PALETTE = "#2f86e0 #e8743b #17a07a #d6498f #b08d1c #9a63d6 #c2483d #6b8794 #4fa3a5 #8c6d4f".split()
SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v"}
TICKS = [step * 10**power for power in range(-2, 6) for step in (1, 2, 5)]  # of logarithmic axes
COLUMN = 3.3  # inches: the width of a paper's column
STYLE: Any = {
    "font.size": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 6,
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "evit",  # the same file each time
}


@dataclass
class Chart:
    """Figures of the same lines over different axes, by the names of their buttons.

    The names of lines have the same colour and marker in all of them.
    """

    id: str
    title: str
    note: str
    views: dict[str, go.Figure] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def view(self, name: str, x: str, y: str, log_x: bool = False) -> go.Figure:
        """Add an empty figure with titled axes."""
        ticks = [f"{tick // 1000}k" if tick > 999 else f"{tick:g}" for tick in TICKS]
        log: Any = dict(type="log", tickvals=TICKS, ticktext=ticks) if log_x else {}
        self.views[name] = go.Figure(
            layout=dict(
                template={},
                xaxis=dict(title=dict(text=literal(x)), **log),
                yaxis=dict(title=dict(text=literal(y))),
                margin=dict(l=10, r=10, t=10, b=10),
                hovermode="closest",
            )
        )
        return self.views[name]

    def line(
        self, figure: go.Figure, name: str, x: Any, y: Any, hover: list[str], spread: Any = None,
        ours: bool = True, mode: str = "lines+markers", faint: bool = False,
    ) -> None:  # fmt: skip
        """Add a line: ours is solid with filled markers, the paper's dotted with hollow ones."""
        if name not in self.names:
            self.names.append(name)
        number = self.names.index(name)
        color = PALETTE[number % len(PALETTE)]
        symbol = list(SYMBOLS)[(number + number // len(PALETTE)) % len(SYMBOLS)]
        shown = literal(name if ours else f"{name} (paper)")
        seen = {trace.name for trace in figure.data if trace.showlegend}
        marker = dict(symbol=symbol if ours else f"{symbol}-open", size=8, color=color)
        bars = spread is not None and any(spread)
        figure.add_scatter(
            name=shown,
            legendgroup=shown,
            showlegend=not faint and shown not in seen,
            x=list(x),
            y=list(y),
            mode=mode,
            opacity=0.35 if faint else 1,
            hoverinfo="text",
            hovertext=[literal(text) for text in hover],
            line=dict(color=color, width=1 if faint else 2, dash="solid" if ours else "dot"),
            marker=marker | dict(line=dict(color=color, width=1.5)),
            error_y=dict(array=list(spread), color=color) if bars else None,
            cliponaxis=False,
        )

    def json(self) -> dict[str, Any]:
        """Plotly's traces and layouts, for page.js."""
        views = [dict(name=name) | figure.to_plotly_json() for name, figure in self.views.items()]
        return dict(id=self.id, views=views)


def literal(text: str) -> str:
    """Text that plotly takes neither for HTML nor for a formula."""
    return html.escape(text).replace("$", "&#36;").replace("\n", "<br>")


def save(chart: Chart, folder: Path) -> None:
    """Write CHART-VIEW.svg and .png, one column of a paper wide."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in chart.views.items():
        stem = f"{chart.id}-{name}".replace("/", "_per_").replace(" ", "_")
        with matplotlib.rc_context(STYLE):
            drawn = draw(figure)
            drawn.savefig(folder / f"{stem}.svg", metadata=dict(Date=None))
            drawn.savefig(folder / f"{stem}.png", dpi=300)


def draw(figure: go.Figure) -> Figure:
    """Draw the traces of a plotly figure with matplotlib."""
    names = {trace.name for trace in figure.data}
    columns = 2 if max(map(len, names)) < 24 else 1
    size = COLUMN, 0.7 * COLUMN + 0.13 * len(names) / columns
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.add_subplot()
    for trace in figure.data:
        hollow = trace.marker.symbol.endswith("-open")
        marker = SYMBOLS[trace.marker.symbol.removesuffix("-open")]
        look: Any = dict(color=trace.line.color, alpha=trace.opacity, linewidth=1, markersize=4)
        if hollow:
            look |= dict(markerfacecolor="white")
        axes.errorbar(
            trace.x,
            trace.y,
            trace.error_y.array,
            label=text(trace.name) if trace.showlegend else None,
            linestyle=(":" if hollow else "-") if "lines" in trace.mode else "none",
            marker=marker if "markers" in trace.mode else "",
            capsize=1.5,
            **look,
        )
    if figure.layout.xaxis.type == "log":
        axes.set_xscale("log")
        axes.set_xticks(TICKS, figure.layout.xaxis.ticktext)
        axes.minorticks_off()
        values = [x for trace in figure.data for x in trace.x]
        axes.set_xlim(min(values) / 1.2, max(values) * 1.2)
    axes.set_xlabel(text(figure.layout.xaxis.title.text))
    axes.set_ylabel(text(figure.layout.yaxis.title.text).replace(" (", "\n("))
    drawn.legend(loc="outside lower left", ncols=columns)
    return drawn


def text(escaped: str) -> str:
    return html.unescape(escaped).replace("$", r"\$")
