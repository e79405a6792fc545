"""Results in, tables and pictures out; here, the table of one evaluation or benchmark."""

import os
import re
from pathlib import Path
from typing import Any

from evit.config import counted

Row = dict[str, Any]
REST = {True: "fused", False: "dropped", None: ""}  # what becomes of the other tokens
MODES = {False: "eager", True: "compiled", "reduce-overhead": "graphs"}
NUMBERS = {  # columns of a benchmark: name in a row, format, divisor
    "ms": ("latency_ms", ",.2f", 1),
    "to dense": ("ratio", ".2f", 1),
    "GMACs": ("macs", ".2f", 1e9),
    "GMACs done": ("macs_executed", ".2f", 1e9),
    "peak %": ("peak_share", ".0f", 0.01),
    "MB": ("memory_bytes", ".0f", 1e6),
    "M parameters": ("params", ".1f", 1e6),
}
NOTES = """Medians of {rounds}, in which the models take turns; IQR: between the quartiles.
fuse, drop: the tokens that are not kept. to dense: speed beside the dense model's of the same form
and dtype, {base}, within each round. dense, this code: with every token kept; what it gains is not
the reduction's. GMACs of one image: as the published tables count, or where they do
not, those done by this code. peak: those done in the time that a large matrix product takes for as
many. MB: weights, images, optimizer state, and other tensors at their most; of graphs it is not
seen. graphs: compiled, with CUDA graphs. bf16, fp16: weights and images; in training autocast."""


def markdown(rows: list[Row]) -> str:
    """Make a Markdown table of rows with the same keys; leave out a column without any text."""
    heads = [head for head in rows[0] if any(str(row[head]) for row in rows)]
    columns = [[plain(str(cell)) for cell in (head, *(r[head] for r in rows))] for head in heads]
    for column in columns:
        width = max(map(len, column))
        column[:] = [cell.ljust(width) for cell in column]
        column.insert(1, "-" * width)
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))


def plain(text: str) -> str:
    """Escape what Markdown, or HTML in it, would not take for letters."""
    return re.sub(r"([|\[])", r"\\\1", text).replace("<", "&lt;")


def rate(row: Row) -> str:
    """Write keep rates as text: one number if all places have the same, a range if many differ."""
    rates = row["keep_rate"]
    if len(set(rates)) > 4:
        return f"{rates[0]:.3g}..{rates[-1]:.3g}"
    return ",".join(f"{rate:.4g}" for rate in (rates[:1] if len(set(rates)) == 1 else rates)) or "1"


def show_evaluation(result: Row, path: Path) -> None:
    """Print an evaluation, a row for each setting, and the path of its evaluation.json."""
    rows, model = result["settings"], result["model"]
    dense = next((row["top1"] for row in rows if rate(row) == "1"), None)
    shown = [
        {"rate": rate(row), "reducer": row["reducer"] or "", "kept": row["selection"] or ""}
        | {"others": REST[row["fusion"]], "top-1": f"{row['top1']:.2f}"}
        | {"change": "" if dense is None or rate(row) == "1" else f"{row['top1'] - dense:+.2f}"}
        | {"KL": f"{row['kl']:.4f}", "top-5": f"{row['top5']:.2f}", "loss": f"{row['loss']:.4f}"}
        | {"GMACs": "" if row["macs"] is None else f"{row['macs'] / 1e9:.3f}"}
        | {"done": f"{row['macs_executed'] / 1e9:.3f}"}
        for row in rows
    ]
    about = f"{model['name']} on {result['data']['name']}, {model['img_size']} px, "
    about += counted(result["images"], "image")
    for head in ("reducer", "kept", "others"):  # what all rows that reduce share is said once
        if len(shared := {row[head] for row in shown} - {""}) < 2:
            about += "".join(f"; {head}: {value}" for value in shared)
            shown = [{k: cell for k, cell in row.items() if k != head} for row in shown]
    print(f"""{about}

{markdown(shown)}

change, KL: top-1 and predictions beside the dense model's. GMACs per image: counted as the \
published tables are, and done. {result["precision"]} on {result["device"]}
{os.path.relpath(path)}""")


def benchmark_text(result: Row) -> str:
    """Make the tables of a benchmark, with what their columns mean and what made them."""
    parts, rows = [], [*result["rows"], *result.get("left_out", [])]
    for what, batch in dict.fromkeys((row["what"], row["batch_size"]) for row in rows):
        same = dict(what=what, batch_size=batch).items()
        peak = max(row["macs_per_s"] for row in result["matmul"] if row.items() >= same) / 1e9
        parts += [f"**{what}, batch {batch}; a large matrix product does {peak:,.0f} GMACs/s**"]
        parts += [markdown([benchmark_cells(row) for row in rows if row.items() >= same])]
    for part in filter(None, map(result.get, ("correctness", "training_run"))):
        parts += [f"**{part['title']}**", markdown(part["rows"]), part["verdict"]]
    base = "at 224 px" if result["config"]["paper"] else "of the same image size"
    notes = NOTES.format(rounds=counted(result["config"]["repeats"], "round"), base=base)
    made = "{device}; torch {packages[torch]}, timm {packages[timm]}, commit {commit}. "
    parts.append(made.format(**result) + notes.replace("\n", " "))
    return "\n\n".join(parts) + "\n"


def benchmark_cells(row: Row) -> Row:
    low, high = row.get("images_per_s_quartiles", (0, 0))
    kept = rate(row) + {True: " fuse", False: " drop", None: ""}[row["fusion"]]
    if row["dense"] or rate(row) == "1":
        kept = "dense" + ", this code" * (not row["dense"])
    model, reason = row["model"].replace("_patch16", "").removesuffix("_224"), row.get("reason", "")
    numbers = {
        title: "" if row.get(name) is None else format(row[name] / unit, form)
        for title, (name, form, unit) in NUMBERS.items()
    }
    return (
        {"model": model, "reducer": row.get("reducer") or "", "keep rate": kept}
        | {"px": row["img_size"], "mode": MODES[row["compile"]], "dtype": row["precision"]}
        | {"images/s": reason.split(" (")[0] or f"{row['images_per_s']:,.1f}"}
        | {"IQR %": f"{100 * (high - low) / row['images_per_s']:.1f}" if high else ""}
        | numbers
        | {"paper: to dense": f"{row['paper']['ratio']:.2f}" if row.get("paper") else ""}
    )
