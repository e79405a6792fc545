"""The table of an evaluation."""

import os
from pathlib import Path
from typing import Any

from evit.config import counted
from evit.report.results import markdown

HEADS = dict(reducer="reducer", selection="kept", fusion="others")
FUSION = {True: "fused", False: "dropped", None: ""}


def show(result: dict[str, Any], path: Path) -> None:
    """Print an evaluation, a row for each setting, and where path, its evaluation.json, lies."""
    rows, model = result["settings"], result["model"]
    dense = next((row["top1"] for row in rows if rate(row) == "1"), None)
    values = {name: [*{row[name] for row in rows} - {None}] for name in HEADS}
    several = [name for name, found in values.items() if len(found) > 1]
    one = [(HEADS[name], found[0]) for name, found in values.items() if len(found) == 1]
    said = "".join(f"; {head}: {FUSION.get(value, value)}" for head, value in one)
    said = counted(result["images"], "image") + said
    print(f"{model['name']} on {result['data']['name']}, {model['img_size']} px, {said}")
    shown = [
        {"rate": rate(row)}
        | {HEADS[name]: FUSION.get(row[name], row[name]) for name in several}
        | {"top-1": f"{row['top1']:.2f}"}
        | {"change": "" if dense is None or rate(row) == "1" else f"{row['top1'] - dense:+.2f}"}
        | {"KL": f"{row['kl']:.4f}", "top-5": f"{row['top5']:.2f}", "loss": f"{row['loss']:.4f}"}
        | {"GMACs": "" if row["macs"] is None else f"{row['macs'] / 1e9:.3f}"}
        | {"done": f"{row['macs_executed'] / 1e9:.3f}"}
        for row in rows
    ]
    print(f"\n{markdown(shown)}\n")
    print(
        f"change, KL: top-1 and predictions beside the dense model's. GMACs per image: counted as "
        f"the published tables are, and done. {result['precision']} on {result['device']}"
    )
    print(os.path.relpath(path))


def rate(row: dict[str, Any]) -> str:
    """The keep rate: one number where all places have the same, the range of many others."""
    rates = row["keep_rate"]
    if len(set(rates)) > 4:
        return f"{rates[0]:.3g}..{rates[-1]:.3g}"
    return ",".join(f"{rate:.4g}" for rate in (rates[:1] if len(set(rates)) == 1 else rates)) or "1"
