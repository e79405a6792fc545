"""The table of an evaluation."""

import os
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

HEADS = dict(selection="kept", fusion="others")
FUSION = {True: "fused", False: "dropped", None: ""}


def show(result: dict[str, Any], path: Path) -> None:
    """Print an evaluation: one row for each keep rate or, where several are asked for, each choice.

    Args:
        result: what path, its evaluation.json, holds.
    """
    console, model = Console(markup=False, width=max(Console().width, 100)), result["model"]
    lines = [f"{model['name']} on {result['data']['name']}, {model['img_size']} px"]
    lines[0] += f", {result['images']} images"
    reducers = {row["reducer"] for row in result["settings"]} - {None}
    selections = {row["selection"] for row in result["settings"]} - {None}
    fusions = {row["fusion"] for row in result["settings"]} - {None}
    if len(reducers) == 1:
        lines.append(f"reducer {reducers.pop()}")
    if len(selections) == 1:
        lines.append(f"kept: {', '.join(selections)} tokens")
    if len(fusions) == 1:
        lines.append("the others: " + FUSION[fusions.pop()])
    console.print("; ".join(lines), highlight=False, soft_wrap=True)
    console.print(table(result["settings"]))
    console.print(
        f"KL: divergence from the dense model's predictions. GMACs per image: counted as the "
        f"published tables are, and executed. "
        f"{result['precision']} on {result['device']}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(os.path.relpath(path), highlight=False, soft_wrap=True)


def table(rows: list[dict[str, Any]]) -> Table:
    """Settings with their metrics, narrow enough for 80 columns."""
    names = ("reducer", "selection", "fusion")
    several = [k for k in names if len({row[k] for row in rows} - {None}) > 1]
    dense = next((row["top1"] for row in rows if is_dense(row)), None)
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    result.add_column("keep\nrate", no_wrap=True)
    for choice in several:
        result.add_column(HEADS.get(choice, choice), no_wrap=True)
    for name in ("top-1", "to dense", "KL", "top-5", "loss", "GMACs", "executed"):
        if name != "to dense" or dense is not None:
            result.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    shown = None
    for row in rows:
        new, shown = row["keep_rate"] != shown, row["keep_rate"]
        if new and several and result.rows:
            result.add_row()
        cells = [rate(row) if new else ""]
        cells += [FUSION.get(row[choice], row[choice] or "") for choice in several]
        cells += [f"{row['top1']:.2f}"]
        if dense is not None:
            cells += ["" if is_dense(row) else f"{row['top1'] - dense:+.2f}"]
        cells += [f"{row['kl']:.4f}"]
        macs = "-" if row["macs"] is None else f"{row['macs'] / 1e9:.3f}"
        cells += [f"{row['top5']:.2f}", f"{row['loss']:.4f}", macs]
        result.add_row(*cells, f"{row['macs_executed'] / 1e9:.3f}")
    return result


def is_dense(row: dict[str, Any]) -> bool:
    return all(rate == 1 for rate in row["keep_rate"])


def rate(row: dict[str, Any]) -> str:
    """The keep rate: one number where all places have the same, the range of many others."""
    rates = row["keep_rate"]
    if len(set(rates)) > 4:
        return f"{rates[0]:.3g}..{rates[-1]:.3g}"
    return ",".join(f"{rate:.4g}" for rate in (rates[:1] if len(set(rates)) == 1 else rates)) or "1"
