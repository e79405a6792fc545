"""Training curves: losses, accuracy and keep rate over the steps of each run."""

import math

import pandas as pd

from evit.report.collect import Run
from evit.report.figures import Chart

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
    """Plot how runs went: a line for each setting, the mean of its runs, which are faint.

    Args:
        names: the settings' names, by their hashes.
    """
    note = "A line for each setting; faint: its runs."
    chart = Chart(f"curves-{index}", "How training went", note, names=list(names.values()))
    for view, (metric, title) in CURVES.items():
        lines: dict[str, list[tuple[Run, pd.Series]]] = {}
        for run in runs:
            curve = pd.Series({row["step"]: row[metric] for row in run.curves if metric in row})
            curve = pd.to_numeric(curve, errors="coerce")
            curve = curve[curve.map(math.isfinite)]
            last = curve[-1:] if len(curve) > MAX_POINTS else curve[:0]
            curve = pd.concat([curve[:: 1 + len(curve) // MAX_POINTS], last])
            if len(curve):
                lines.setdefault(names[run.row["setting"]], []).append((run, curve))
        if not any(len(curve) > 1 for several in lines.values() for _, curve in several):
            continue
        figure = chart.view(view, "training step (optimizer updates)", title)
        for name, several in lines.items():
            shown = [(f"seed {run.row['seed']}", curve) for run, curve in several]
            if len(several) > 1:  # over the steps that all have
                mean = pd.concat([curve for _, curve in several], axis=1, join="inner").mean(axis=1)
                shown.append((f"mean of {len(several)} runs", mean))
            for i, (which, curve) in enumerate(shown):
                texts = [f"{name}, {which}\nstep {x}\n{title}: {y:.4g}" for x, y in curve.items()]
                faint = i < len(shown) - 1
                mode = "lines" if faint or len(curve) > 30 else "lines+markers"
                chart.line(figure, name, curve.index, curve, texts, mode=mode, faint=faint)
    return chart if chart.views else None
