"""The tables and the figure of a benchmark."""

import io
import os
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from evit.report import results

Row = dict[str, Any]
MODES = {False: "eager", True: "compiled", "reduce-overhead": "graphs"}
NOTES = """Medians of {repeats} rounds, in which the models take turns.
rest: the tokens that are not kept. IQR: between the quartiles of the rounds, %.
to dense: speed beside the dense model's of the same form and dtype, {base}, within each round.
dense, linear patch embedding: this code with every token kept; its gain is not the reduction's.
GMACs of one image: as the published tables count, or where they do not, those done by this code.
peak: those done in the time that a large matrix product takes for as many.
MB: weights, images, optimizer state, and other tensors at their most; of graphs it is not seen.
graphs: compiled, with CUDA graphs. bf16, fp16: weights and images; in training autocast."""


def show(result: Row, path: Path) -> None:
    """Print the tables, and where path, their benchmark.json, lies."""
    print(f"\n{text(result, 99)}\n{os.path.relpath(path)}")


def write(result: Row, target: Path) -> None:
    """Keep table.md and benchmark.json in a folder."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "table.md").write_text(markdown(result))
    results.write_json(result, target / "benchmark.json")
    print(f"{target}/table.md  {target}/benchmark.json")


def markdown(result: Row) -> str:
    return text(result, None)


def text(result: Row, width: int | None) -> str:
    """The tables, what their columns mean and what made them; as Markdown where no width is set."""
    console = Console(width=width or 1000, file=io.StringIO(), markup=False, highlight=False)
    style = box.SIMPLE_HEAD if width else box.MARKDOWN

    def title(words: str) -> None:
        console.print(words if width else f"**{words}**\n", soft_wrap=True)

    rows = [*result["rows"], *result.get("left_out", [])]
    for what, batch in dict.fromkeys((row["what"], row["batch_size"]) for row in rows):
        found, peaks = (
            [row for row in several if (row["what"], row["batch_size"]) == (what, batch)]
            for several in (rows, result["matmul"])
        )
        reduced = [row for row in found if not row["dense"]] or found
        params = {short(row["model"]): row["params"] / 1e6 for row in reduced}
        names = ", ".join(f"{name} ({count:.1f} M parameters)" for name, count in params.items())
        peak = max(peak["macs_per_s"] for peak in peaks) / 1e9
        title(f"{names}: {what}, batch {batch}; a large matrix product does {peak:,.0f} GMACs/s")
        console.print(table(columns(found, several=len(params) > 1), style))
        console.print()
    for name in ("loader", "correctness", "training_run"):
        if part := result.get(name):
            title(part["title"])
            kept = [key for key in part["rows"][0] if not key.endswith("quartiles")]
            lines = {key: [number(row[key]) for row in part["rows"]] for key in kept}
            console.print(table(lines, style))
            console.print(f"\n{part['verdict']}\n", soft_wrap=True)
    console.print(note(result), soft_wrap=True)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() if width else line.strip() for line in lines) + "\n"


def table(lines: dict[str, list[str]], style: box.Box) -> Table:
    """Columns as a table: on a terminal of 99 characters, or in Markdown."""
    terminal = style is not box.MARKDOWN
    result = Table(box=style, show_edge=not terminal, padding=(0, not terminal, 0, not terminal))
    for name, cells in lines.items():
        left = name in ("model", "reducer", "keep rate", "rest", "mode", "dtype", "name")
        head = name.replace(" ", "\n").replace("/s", "\n/s") if terminal else name
        result.add_column(
            head,
            justify="left" if left else "right",
            min_width=None if left else max(map(len, (*head.split("\n"), *cells))) + terminal,
        )
    for row in zip(*lines.values(), strict=True):
        result.add_row(*row)
    return result


def columns(rows: list[Row], several: bool) -> dict[str, list[str]]:
    """The cells by column; columns that would say nothing here are left out.

    Args:
        several: models, so that each row needs its name.
    """

    def of(name: str, show: Any, empty: str = "-") -> list[str]:
        return [empty if row.get(name) is None else show(row[name]) for row in rows]

    found: dict[str, list[str]] = {}
    if several:
        found["model"] = of("model", short)
    if any(row.get("reducer") for row in rows):
        found["reducer"] = of("reducer", str, "")
    found["keep rate"] = [rate(row) for row in rows]
    if any(row["fusion"] is not None for row in rows):
        found["rest"] = of("fusion", lambda fused: "fuse" if fused else "drop", "")
    if len({row["img_size"] for row in rows}) > 1:
        found["px"] = of("img_size", str)
    found["mode"] = [MODES[row["compile"]] for row in rows]
    found["dtype"] = of("precision", str)
    found["images/s"] = [
        row["reason"].split(" (")[0] if "reason" in row else number(row["images_per_s"])
        for row in rows
    ]
    found["IQR %"] = [width(row, "images_per_s") for row in rows]
    found["ms"] = of("latency_ms", number)
    found["to dense"] = of("ratio", "{:.2f}".format)
    found["its IQR"] = [width(row, "ratio") for row in rows]
    if any(row.get("paper") for row in rows):
        theirs = [row.get("paper") or {} for row in rows]
        found["paper: to dense"] = [f"{t['ratio']:.2f}" if t else "-" for t in theirs]
        found["paper: GMACs"] = [f"{t['macs']:.1f}" if t else "-" for t in theirs]
    found["GMACs"] = of("macs", lambda macs: f"{macs / 1e9:.2f}")
    found["GMACs done"] = of("macs_executed", lambda macs: f"{macs / 1e9:.2f}")
    found["peak %"] = of("peak_share", "{:.0%}".format)
    found["MB"] = of("memory_bytes", lambda size: f"{size / 1e6:.0f}")
    return found


def rate(row: Row) -> str:
    """What a row keeps."""
    rates = row["keep_rate"]
    if row["dense"]:
        return "dense"
    if set(rates) == {1}:
        return "dense, linear patch embedding" if "reducer" in row else "1"
    return f"{rates[0]:g}" if len(set(rates)) == 1 else " ".join(f"{r:g}" for r in rates)


def width(row: Row, name: str) -> str:
    """The distance between the quartiles, in percent of the median."""
    low, high = row.get(f"{name}_quartiles", (None, None))
    return "-" if low is None else f"{100 * (high - low) / row[name]:.1f}"


def note(result: Row) -> str:
    """What the columns mean, and what made them."""
    config, versions = result["config"], result["packages"]
    made = f"{result['device']}; torch {versions['torch']}, timm {versions['timm']}, "
    made += f"commit {result['commit']}. "
    base = "at 224 px, which is the paper's" if config["paper"] else "of the same image size"
    if not result["rows"]:
        return made
    return made + NOTES.format(repeats=config["repeats"], base=base).replace("\n", " ")


def short(model: str) -> str:
    return model.replace("_patch16", "").removesuffix("_224")


def number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.{0 if value >= 1000 else 1 if value >= 10 else 2}f}"


def draw(result: Row, path: Path) -> None:
    """Draw a bar for each row of the largest batch: its speed beside the dense model's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    largest = max(row["batch_size"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["batch_size"] == largest][::-1]
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.22 * len(rows)), layout="constrained")
    names = []
    for row in rows:
        rest = {True: ", fuse", False: ", drop", None: ""}[row["fusion"]]
        name = f"{short(row['model'])} {row['img_size']} px, {rate(row)}{rest}"
        names.append(f"{name}: {row['what']}, {MODES[row['compile']]}")
    bars = axes.barh(range(len(rows)), [row["ratio"] for row in rows], color="tab:blue")
    axes.bar_label(bars, [f"{row['images_per_s']:,.0f} images/s" for row in rows], fontsize=6)
    axes.set_yticks(range(len(rows)), names, fontsize=6)
    axes.set_xlabel(f"speed beside the dense model, batch {largest}, {result['device']}")
    axes.margins(x=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
