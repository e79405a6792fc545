"""How training went: losses, accuracy and keep rate over the steps of each run."""

import math
import statistics
from typing import Any

from evit.report.charts import Chart, Series, View
from evit.report.found import Run

MAX_POINTS = 400  # of a curve
CURVES = {
    "top-1": ("val/top1", "top-1 accuracy, validation (%)"),
    "training loss": ("train/loss", "training loss (nats)"),
    "validation loss": ("val/loss", "validation loss (nats)"),
    "keep rate": ("keep_rate", "keep rate (share of tokens)"),
    "tokens": ("tokens_per_image", "image tokens of a block, mean (tokens)"),
    "learning rate": ("lr", "learning rate (1 per step)"),
}


def curves(index: int, runs: list[Run], names: dict[str, str]) -> Chart | None:
    """How runs went, over their steps; a colour for each setting.

    Args:
        names: of the settings, by their hash.
    """
    views = []
    for name, (metric, title) in CURVES.items():
        series: list[Series] = []
        several: dict[str, list[Series]] = {}
        for run in runs:
            rows = [row for row in run.curves if is_number(row.get(metric))]
            rows = rows[:: 1 + len(rows) // MAX_POINTS] + rows[-1:] * (len(rows) > MAX_POINTS)
            shown = names[run.row["setting"]]
            color = f"#{list(names).index(run.row['setting'])}"
            x, y = [row["step"] for row in rows], [float(f"{row[metric]:.6g}") for row in rows]
            text = f"{shown}, seed {run.row['seed']}\nstep %{{x}}\n{title}: %{{y:.4g}}"
            few = len(rows) <= 30
            if rows:
                series.append(Series(shown, color, x, y, markers=few, template=text))
                several.setdefault(shown, []).append(series[-1])
        series += [mean(lines, title) for lines in several.values() if len(lines) > 1]
        if any(len(line.x) > 1 for line in series):
            views.append(View(name, "training step (optimizer updates)", title, series))
    if not views:
        return None
    return Chart(
        f"curves-{index}",
        "How training went",
        "A line for each setting; faint: its runs.",
        views,
    )


def mean(lines: list[Series], title: str) -> Series:
    """The mean of the curves of a setting, which become faint: of the steps that all have."""
    values = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    steps = sorted(set.intersection(*(set(line.x) for line in lines)))
    for line in lines:
        line.faint, line.markers = True, False
    y = [float(f"{statistics.mean(value[x] for value in values):.6g}") for x in steps]
    first = lines[0]
    text = f"{first.name}, mean of {len(lines)} runs\nstep %{{x}}\n{title}: %{{y:.4g}}"
    return Series(first.name, first.family, steps, y, markers=len(steps) <= 30, template=text)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
