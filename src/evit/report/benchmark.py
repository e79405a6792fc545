"""The tables of a benchmark."""

from typing import Any

from evit.config import counted
from evit.report import results

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
NOTES = """Medians of {rounds}, in which the models take turns; IQR: between the quartiles.
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
        same = dict(what=what, batch_size=batch).items()
        peak = max(row["macs_per_s"] for row in result["matmul"] if row.items() >= same) / 1e9
        title = f"{what}, batch {batch}; a large matrix product does {peak:,.0f} GMACs/s"
        found = [cells(row) for row in rows if row.items() >= same]
        parts += [f"**{title}**", results.markdown(found)]
    for part in filter(None, map(result.get, ("correctness", "training_run"))):
        parts += [f"**{part['title']}**", results.markdown(part["rows"]), part["verdict"]]
    base = "at 224 px" if result["config"]["paper"] else "of the same image size"
    rounds = counted(result["config"]["repeats"], "round")
    notes = NOTES.format(rounds=rounds, base=base).replace("\n", " ")
    versions = "torch {torch}, timm {timm}".format(**result["packages"])
    parts.append(f"{result['device']}; {versions}, commit {result['commit']}. {notes}")
    return "\n\n".join(parts) + "\n"


def cells(row: Row) -> dict[str, str]:
    rates, theirs = [f"{rate:g}" for rate in row["keep_rate"]], row.get("paper")
    rest = {True: " fuse", False: " drop", None: ""}[row["fusion"]]
    rate = (rates[0] if len(set(rates)) == 1 else " ".join(rates)) + rest
    if row["dense"] or set(rates) == {"1"}:
        rate = "dense" + ", this code" * (not row["dense"])
    low, high = row.get("images_per_s_quartiles", (0, 0))
    numbers = {
        title: "" if row.get(name) is None else format(row[name] / unit, form)
        for title, (name, form, unit) in NUMBERS.items()
    }
    return {
        "model": row["model"].replace("_patch16", "").removesuffix("_224"),
        "reducer": row.get("reducer") or "",
        "keep rate": rate,
        "px": str(row["img_size"]),
        "mode": MODES[row["compile"]],
        "dtype": row["precision"],
        "images/s": row.get("reason", "").split(" (")[0] or f"{row['images_per_s']:,.1f}",
        "IQR %": f"{100 * (high - low) / row['images_per_s']:.1f}" if "ratio" in row else "",
        **numbers,
        "paper: to dense": f"{theirs['ratio']:.2f}" if theirs else "",
    }
