"""The tables and the figure of a benchmark."""

import io
import os
import re
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
        sizes = len({row["img_size"] for row in found}) > 1
        console.print(table([cells(row, len(params) > 1, sizes) for row in found], style))
        console.print()
    for name in ("loader", "correctness", "training_run"):
        if part := result.get(name):
            title(part["title"])
            shown = [{key: number(value) for key, value in row.items()} for row in part["rows"]]
            console.print(table(shown, style))
            console.print(f"\n{part['verdict']}\n", soft_wrap=True)
    console.print(note(result), soft_wrap=True)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    joined = "\n".join(line.rstrip() if width else line.strip() for line in lines) + "\n"
    return re.sub(r"\n{3,}", "\n\n", joined)


def table(rows: list[dict[str, str]], style: box.Box) -> Table:
    """Rows of cells, on a terminal or in Markdown; columns that say nothing are left out."""
    terminal = style is not box.MARKDOWN
    result = Table(box=style, show_edge=not terminal, padding=(0, not terminal, 0, not terminal))
    shown = [name for name in rows[0] if any(row[name] for row in rows)]
    for name in shown:
        left = name in ("model", "reducer", "keep rate", "rest", "mode", "dtype", "case")
        result.add_column(name, justify="left" if left else "right")
    for row in rows:
        result.add_row(*(row[name] for name in shown))
    return result


def cells(row: Row, names: bool, sizes: bool) -> dict[str, str]:
    """A row's cells, with the model's name and the image size where rows differ in them."""

    def of(name: str, show: Any) -> str:
        return "-" if row.get(name) is None else show(row[name])

    theirs = row.get("paper")
    return {
        "model": short(row["model"]) if names else "",
        "reducer": row.get("reducer") or "",
        "keep rate": rate(row),
        "rest": {True: "fuse", False: "drop", None: ""}[row["fusion"]],
        "px": str(row["img_size"]) if sizes else "",
        "mode": MODES[row["compile"]],
        "dtype": row["precision"],
        "images/s": row.get("reason", "").split(" (")[0] or number(row["images_per_s"]),
        "IQR %": width(row, "images_per_s"),
        "ms": of("latency_ms", number),
        "to dense": of("ratio", "{:.2f}".format),
        "its IQR": width(row, "ratio"),
        "paper: to dense": f"{theirs['ratio']:.2f}" if theirs else "",
        "GMACs": of("macs", lambda macs: f"{macs / 1e9:.2f}"),
        "paper: GMACs": f"{theirs['macs']:.1f}" if theirs else "",
        "GMACs done": of("macs_executed", lambda macs: f"{macs / 1e9:.2f}"),
        "peak %": of("peak_share", lambda share: f"{100 * share:.0f}"),
        "MB": of("memory_bytes", lambda size: f"{size / 1e6:.0f}"),
    }


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
    axes.set_title(f"{result['device']}, batch {largest}", fontsize=8)
    axes.set_xlabel("speed beside the dense model", fontsize=8)
    axes.margins(x=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
