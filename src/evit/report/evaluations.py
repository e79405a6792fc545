"""The table of an evaluation."""

import os
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

HEADS = dict(reducer="reducer", selection="kept", fusion="others")
FUSION = {True: "fused", False: "dropped", None: ""}


def show(result: dict[str, Any], path: Path) -> None:
    """Print an evaluation, and where path, its evaluation.json, lies.

    It has a row for each keep rate or, where several are asked for, each choice.
    """
    console, model = Console(markup=False, width=max(Console().width, 100)), result["model"]
    title = f"{model['name']} on {result['data']['name']}, {model['img_size']} px"
    lines = [f"{title}, {result['images']} images"]
    for name, head in HEADS.items():
        if len(values := {row[name] for row in result["settings"]} - {None}) == 1:
            (value,) = values
            lines.append(f"{head}: {FUSION.get(value, value)}")
    say: Any = dict(highlight=False, soft_wrap=True)
    console.print("; ".join(lines), **say)
    console.print(table(result["settings"]))
    console.print(
        f"KL: divergence from the dense model's predictions. GMACs per image: counted as the "
        f"published tables are, and executed. {result['precision']} on {result['device']}",
        **say,
    )
    console.print(os.path.relpath(path), **say)


def table(rows: list[dict[str, Any]]) -> Table:
    """Settings with their metrics, narrow enough for 80 columns."""
    several = [name for name in HEADS if len({row[name] for row in rows} - {None}) > 1]
    dense = next((row["top1"] for row in rows if rate(row) == "1"), None)
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("keep\nrate", *(HEADS[name] for name in several)):
        result.add_column(name, no_wrap=True)
    for name in ("top-1", "to\ndense", "KL", "top-5", "loss", "GMACs", "executed"):
        result.add_column(name, justify="right", no_wrap=True)
    for row, before in zip(rows, [None, *rows], strict=False):
        new = before is None or row["keep_rate"] != before["keep_rate"]
        if new and several and before:
            result.add_row()
        apart = "" if dense is None or rate(row) == "1" else f"{row['top1'] - dense:+.2f}"
        result.add_row(
            rate(row) if new else "",
            *(FUSION.get(row[name], row[name] or "") for name in several),
            f"{row['top1']:.2f}",
            apart,
            f"{row['kl']:.4f}",
            f"{row['top5']:.2f}",
            f"{row['loss']:.4f}",
            "-" if row["macs"] is None else f"{row['macs'] / 1e9:.3f}",
            f"{row['macs_executed'] / 1e9:.3f}",
        )
    return result


def rate(row: dict[str, Any]) -> str:
    """The keep rate: one number where all places have the same, the range of many others."""
    rates = row["keep_rate"]
    if len(set(rates)) > 4:
        return f"{rates[0]:.3g}..{rates[-1]:.3g}"
    return ",".join(f"{rate:.4g}" for rate in (rates[:1] if len(set(rates)) == 1 else rates)) or "1"
