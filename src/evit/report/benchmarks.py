"""The tables of a benchmark."""

import itertools
import os
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from evit.measure.contest import Group
from evit.report import results
from evit.report.evaluations import rate

Row = dict[str, Any]
KEYS = ("what", "batch_size", "precision", "compile")
FUSION = {True: "fuse", False: "drop", None: ""}


def show(result: Row, path: Path) -> None:
    """Print the tables, and where path, their benchmark.json, lies."""
    console = Console(width=99, markup=False)

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    for title, lines in groups(result):
        line(f"\n{title}")
        console.print(grid(lines))
    if loader := result.get("loader"):
        line(f"\n{loader['title']}")
        for row in loader["rows"]:
            line(f"  {row['name']:12s} {row['images_per_s']:10.1f} images/s")
        line(loader["verdict"])
        if loader["readers"]:
            line("\nReading training images, on the CPU")
            console.print(grid(readers(loader["readers"])))
    line("\n" + note(result))
    line(os.path.relpath(path))


def grid(lines: list[list[str]]) -> Table:
    """A header and rows as a table for the terminal."""
    head, *body = lines
    gap = 0 if len(head) > 11 else 1
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, gap, 0, 0))
    for name in head:
        justify: Any = "left" if name in ("model", "keep rate", "rest", "name") else "right"
        longest = 21 if name == "model" else None
        text = name.replace(" ", "\n").replace("/s", "\n/s")
        table.add_column(text, justify=justify, no_wrap=True, max_width=longest)
    for row in body:
        table.add_row(*row)
    return table


def readers(rows: list[Row]) -> list[list[str]]:
    """The header and a line for each way to read images."""
    head = [key.replace("_", " ") for key in rows[0]]
    values = [[digits(v) if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    return [head, *values]


def markdown(result: Row) -> str:
    """The tables, and what their columns mean."""
    lines = []
    for title, (head, *body) in groups(result):
        lines += [f"**{title}**", "", _line(head), "|" + "---|" * len(head)]
        lines += [*map(_line, body), ""]
    if loader := result.get("loader"):
        lines += [f"**{loader['title']}**", "", "| | images/s |", "|---|---|"]
        lines += [f"| {row['name']} | {row['images_per_s']:.1f} |" for row in loader["rows"]]
        lines += ["", loader["verdict"], ""]
        if loader["readers"]:
            head, *body = readers(loader["readers"])
            lines += [_line(head), "|" + "---|" * len(head), *map(_line, body), ""]
    return "\n".join([*lines, note(result)]) + "\n"


def write(result: Row, target: Path) -> None:
    """table.md and benchmark.json, to keep."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "table.md").write_text(markdown(result))
    results.write_json(result, target / "benchmark.json")
    print(f"{target}/table.md  {target}/benchmark.json")


def groups(result: Row) -> list[tuple[str, list[list[str]]]]:
    """A title and a table, its header first, for what took turns."""
    found = []
    for key, group in itertools.groupby(result["rows"], lambda row: [row[k] for k in KEYS]):
        rows = list(group)
        peak = next(p["macs_per_s"] for p in result["matmul"] if [p[k] for k in KEYS] == key)
        sparse = [row for row in rows if not row["dense"]]
        params = {short(row["model"]): row["params"] for row in reversed(sparse or rows)}
        names = [f"{name} ({count / 1e6:.1f} M parameters)" for name, count in params.items()]
        title = f"{', '.join(reversed(names))}: {Group(*key)}"
        title += f"; a large matrix product does {peak / 1e9:,.0f} GMACs/s"
        found.append((title, cells(rows, several=len(names) > 1)))
    return found


def cells(rows: list[Row], several: bool) -> list[list[str]]:
    """The header and a line for each row; columns that say nothing here are left out.

    Args:
        several: models, so that each row needs its name.
    """
    columns: dict[str, list[str]] = {}
    if several:
        columns["model"] = [short(row["model"]) for row in rows]
    columns["keep rate"] = ["dense" if row["dense"] else rate(row) for row in rows]
    if any(row["fusion"] is not None for row in rows):
        columns["rest"] = [FUSION[row["fusion"]] for row in rows]
    if len({row["img_size"] for row in rows}) > 1:
        columns["px"] = [str(row["img_size"]) for row in rows]
    columns["images/s"] = [digits(row["images_per_s"]) for row in rows]
    columns["IQR %"] = [width(row, "images_per_s") for row in rows]
    columns["ms"] = [digits(row["latency_ms"]) for row in rows]
    columns["to dense"] = [f"{row['ratio']:.2f}" for row in rows]
    columns["its IQR"] = [width(row, "ratio") for row in rows]
    theirs = [row.get("paper") or {} for row in rows]
    if any(theirs):
        columns["paper: to dense"] = [f"{t['ratio']:.2f}" if t else "-" for t in theirs]
    columns["GMACs"] = [f"{row['macs'] / 1e9:.2f}" for row in rows]
    if any(theirs):
        columns["paper: GMACs"] = [f"{t['macs']:.1f}" if t else "-" for t in theirs]
    columns["GMACs done"] = [f"{row['macs_executed'] / 1e9:.2f}" for row in rows]
    columns["peak %"] = [f"{100 * row['peak_share']:.0f}" for row in rows]
    sizes = [row["memory_bytes"] for row in rows]
    columns["MB"] = ["-" if size is None else f"{size / 1e6:.0f}" for size in sizes]
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def width(row: Row, name: str) -> str:
    """The distance between the quartiles, in percent of the median."""
    low, high = row[f"{name}_quartiles"]
    return f"{100 * (high - low) / row[name]:.1f}"


def note(result: Row) -> str:
    """What the columns mean, and what made them."""
    config, versions = result["config"], result["packages"]
    parts = [
        f"{result['device']}; torch {versions['torch']}, timm {versions['timm']}, "
        f"commit {result['commit']}."
    ]
    if result["rows"]:
        base = " at 224 px, which is the paper's" if config["paper"] else " of the same image size"
        backward = ", backward included" if "training" in config["what"] else ""
        parts += [
            f"Medians of {config['repeats']} rounds, in which the models take turns.",
            "rest: the tokens that are not kept. IQR: between the quartiles of the rounds, %.",
            f"to dense: speed beside the dense model's{base}, within each round.",
            f"GMACs of one image: as the published tables count; done: by this code{backward}.",
            *["Of models of other kinds: those done."]
            * any(not r["keep_rate"] for r in result["rows"]),
            "peak: these in the time that the matrix product takes for as many.",
            "MB: weights, images, optimizer state, and other tensors at their most.",
        ]
    if set(config["precisions"]) & {"bf16", "fp16"}:
        parts.append("bf16, fp16: weights and images; in training autocast.")
    return " ".join(parts)


def short(model: str) -> str:
    return model.replace("_patch16", "").removesuffix("_224")


def digits(value: float) -> str:
    return f"{value:.{0 if value >= 1000 else 1 if value >= 10 else 2}f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
