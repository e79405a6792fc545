"""The tables and the figure of a benchmark."""

from pathlib import Path
from typing import Any

import pandas as pd

Row = dict[str, Any]
MODES = {False: "eager", True: "compiled", "reduce-overhead": "graphs"}
NUMBERS = {  # title: name in a row, format, divisor
    "ms": ("latency_ms", ",.2f", 1),
    "to dense": ("ratio", ".2f", 1),
    "GMACs": ("macs", ".2f", 1e9),
    "GMACs done": ("macs_executed", ".2f", 1e9),
    "peak %": ("peak_share", ".0f", 0.01),
    "MB": ("memory_bytes", ".0f", 1e6),
    "M parameters": ("params", ".1f", 1e6),
}
NOTES = """Medians of {repeats} rounds, in which the models take turns; IQR: between the quartiles.
fuse, drop: the tokens that are not kept. to dense: speed beside the dense model's of the same form
and dtype, {base}, within each round. dense, this code: with every token kept; what it gains is not
the reduction's. GMACs of one image: as the published tables count, or where they do
not, those done by this code. peak: those done in the time that a large matrix product takes for as
many. MB: weights, images, optimizer state, and other tensors at their most; of graphs it is not
seen. graphs: compiled, with CUDA graphs. bf16, fp16: weights and images; in training autocast."""


def markdown(result: Row) -> str:
    """The tables, what their columns mean and what made them."""
    parts, rows = [], [*result["rows"], *result.get("left_out", [])]
    for what, batch in dict.fromkeys((row["what"], row["batch_size"]) for row in rows):
        found, peaks = (
            [row for row in several if (row["what"], row["batch_size"]) == (what, batch)]
            for several in (rows, result["matmul"])
        )
        peak = max(row["macs_per_s"] for row in peaks) / 1e9
        title = f"{what}, batch {batch}; a large matrix product does {peak:,.0f} GMACs/s"
        parts += [f"**{title}**", table([cells(row) for row in found])]
    for part in filter(None, map(result.get, ("correctness", "training_run"))):
        parts += [f"**{part['title']}**", table(part["rows"]), part["verdict"]]
    base = "at 224 px" if result["config"]["paper"] else "of the same image size"
    notes = NOTES.format(repeats=result["config"]["repeats"], base=base).replace("\n", " ")
    versions = "torch {torch}, timm {timm}".format(**result["packages"])
    parts.append(f"{result['device']}; {versions}, commit {result['commit']}. {notes}")
    return "\n\n".join(parts) + "\n"


def table(rows: list[Row]) -> str:
    """Rows in Markdown; columns that say nothing are left out."""
    frame = pd.DataFrame(rows).astype(str)
    frame = frame.loc[:, (frame != "").any()]
    lines = [list(frame), *frame.values.tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def cells(row: Row) -> dict[str, str]:
    rates, theirs = [f"{rate:g}" for rate in row["keep_rate"]], row.get("paper")
    rest = {True: " fuse", False: " drop", None: ""}[row["fusion"]]
    rate = (rates[0] if len(set(rates)) == 1 else " ".join(rates)) + rest
    if row["dense"] or set(rates) == {"1"}:
        rate = "dense" + ", this code" * (not row["dense"])
    found = {
        "model": row["model"].replace("_patch16", "").removesuffix("_224"),
        "reducer": row.get("reducer") or "",
        "keep rate": rate,
        "px": str(row["img_size"]),
        "mode": MODES[row["compile"]],
        "dtype": row["precision"],
        "images/s": row.get("reason", "").split(" (")[0] or f"{row['images_per_s']:,.1f}",
        "IQR %": "",
    }
    if "ratio" in row:
        low, high = row["images_per_s_quartiles"]
        found["IQR %"] = f"{100 * (high - low) / row['images_per_s']:.1f}"
    for title, (name, form, unit) in NUMBERS.items():
        found[title] = "" if row.get(name) is None else format(row[name] / unit, form)
    return found | {"paper: to dense": f"{theirs['ratio']:.2f}" if theirs else ""}


def draw(result: Row, path: Path) -> None:
    """Draw a bar for each row of the largest batch: its speed beside the dense model's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    largest = max(row["batch_size"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["batch_size"] == largest][::-1]
    shown = ("model", "keep rate", "px", "mode")
    names = [" ".join([row["what"], *(cells(row)[name] for name in shown)]) for row in rows]
    title = f"Speed beside the dense model's: {result['device']}, batch {largest}"
    bars = pd.Series([row["ratio"] for row in rows], names)
    axes = bars.plot.barh(figsize=(7, 1 + 0.22 * len(rows)), fontsize=6, title=title)
    texts = [f"{row['images_per_s']:,.0f} images/s" for row in rows]
    axes.bar_label(axes.containers[0], texts, fontsize=6)
    axes.figure.savefig(path, bbox_inches="tight")
    pyplot.close(axes.figure)
