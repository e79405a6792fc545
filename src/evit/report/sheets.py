"""The tables of the report, for the page and as Markdown; and its headline."""

from collections.abc import Sequence
from dataclasses import dataclass

from evit.report import compare, tables
from evit.report.charts import NAMES, group, label
from evit.report.compare import TITLES
from evit.report.found import Found
from evit.report.points import SCRATCH, Point, dense_of
from evit.report.tables import plain

NOT_RUN, UNPUBLISHED = "not run", "-"
METRICS = (  # of a table of the paper: title, attribute, decimals
    ("top-1 (%)", "top1", 1),
    ("top-5 (%)", "top5", 1),
    ("speed-up (x dense)", "speed", 2),
    ("GMACs", "macs", 1),
)


@dataclass
class Sheet:
    """A table: titles over groups of columns, each with how many it spans; columns; rows.

    The first columns say what a row is; the others are numbers.
    """

    title: str
    note: str
    groups: list[tuple[str, int]]
    columns: list[str]
    rows: list[list[str]]
    labels: int

    def markdown(self) -> str:
        spans = [name for name, count in self.groups for _ in range(count)]
        head = [f"{a} {b}".strip() for a, b in zip(spans, self.columns, strict=True)]
        lines = [head, ["---"] * len(head), *self.rows]
        text = "\n".join("| " + " | ".join(map(plain, cells)) + " |" for cells in lines)
        return f"**{plain(self.title)}**\n\n{text}\n\n{plain(self.note)}\n"


def paper_sheet(content: Found, name: str) -> Sheet:
    """A table of the paper: each number, ours, and ours less the paper's."""
    way, pairs = compare.pairs(content, name)
    metrics = [m for m in METRICS if any(getattr(row, m[1]) is not None for row, _ in pairs)]
    models = name == "dynamicvit_deit_s"
    sizes = len({row.img_size for row, _ in pairs}) > 1
    rests = len({row.rest for row, _ in pairs} - {""}) > 1 and not models
    columns = ["model", "weights", "epochs"] * models + ["keep rate"] + ["the rest"] * rests
    columns += ["px"] * sizes
    groups = [("", len(columns))]
    for title, _, _ in metrics:
        columns += ["paper", "ours", "difference"]
        groups.append((title, 3))
    rows = []
    for row, own in pairs:
        cells = [NAMES[row.model], row.start, str(row.epochs)] if models else []
        cells += [label(row, row.img_size)] + [row.rest] * rests + [str(row.img_size)] * sizes
        for _, key, digits in metrics:
            cells += numbers(getattr(row, key), getattr(own, key, None), digits)
            if key == "top1" and own and own.spread is not None:
                cells[-2] = f"{own.top1_text}, {own.runs} runs"
        rows.append(cells)
    note = "Speed is relative to the dense model of the same table at 224 px"
    note += f", ours on {way}." if way else "; ours has not been measured (src/benchmark.py)."
    if name == "off_the_shelf":
        note = "The paper does not say what becomes of the other tokens."
    return Sheet(TITLES[name], note, groups, columns, rows, labels=groups[0][1])


def numbers(theirs: float | None, own: float | None, digits: int) -> list[str]:
    """The paper's number, ours and the difference; ours with a digit more."""
    if own is None:
        return [UNPUBLISHED if theirs is None else f"{theirs:.{digits}f}", NOT_RUN, ""]
    shown = f"{own:.{max(digits, 2)}f}"
    if theirs is None:
        return [UNPUBLISHED, shown, ""]
    return [f"{theirs:.{digits}f}", shown, signed(own - theirs)]


def signed(difference: float) -> str:
    return f"{round(difference, 2) + 0.0:+.2f}"  # no -0.00


def papers(content: Found) -> list[Sheet]:
    return [paper_sheet(content, name) for name in TITLES]


def runs(title: str, points: Sequence[Point]) -> Sheet:
    """Our settings on one data set, beside their dense models; those with most MACs first."""
    sizes = len({point.img_size for point in points}) > 1
    recipes = any(point.recipe_name for point in points)
    columns = ["model", "keep rate", "the rest"] + ["px"] * sizes + ["weights", "epochs"]
    columns += ["recipe"] * recipes
    columns += ["runs"]
    labels = len(columns)
    columns += ["top-1 (%)", "to dense", "top-5 (%)", "GMACs", "% of dense", "speed-up"]
    rows = []
    for point in sorted(points, key=lambda p: (p.start, -(p.macs or 0))):
        dense = dense_of(point, points)
        assert point.top1 is not None and point.top5 is not None and point.macs is not None
        cells = [point.model, label(point, point.img_size), point.rest]
        cells += [str(point.img_size)] * sizes + [point.start, str(point.epochs or "")]
        cells += [point.recipe_name] * recipes + [str(point.runs), point.top1_text]
        if dense and dense.macs and dense.top1 is not None:
            beside = [signed(point.top1 - dense.top1), f"{100 * point.macs / dense.macs:.0f}"]
        else:
            beside = ["", ""]
        cells += [beside[0], f"{point.top5:.2f}", f"{point.macs:.4g}", beside[1]]
        speed = point.speed
        if speed is None and dense and point.images_per_s and dense.images_per_s:
            speed = point.images_per_s / dense.images_per_s
        cells.append("" if speed is None else f"{speed:.2f}")
        rows.append(cells)
    same = {name: {row[i] for row in rows} for i, name in enumerate(columns)}
    names = ("model", "weights", "epochs", "runs") if len(rows) > 1 else ()
    same = {name: same[name] for name in names if len(same[name]) == 1}
    said = "; ".join(f"{name}: {value}" for name, (value,) in same.items() if value)
    shown = [i for i, name in enumerate(columns) if name not in same]
    rows, columns = [[row[i] for i in shown] for row in rows], [columns[i] for i in shown]
    labels -= len(same)
    note = (
        "The mean over the seeds of a setting, with the standard deviation. To dense: points from "
        "the mean of the dense runs by the same recipe; or from what was fine-tuned or evaluated. "
        "Speed-up: images/s beside the dense model's, by src/benchmark.py, else by the runs."
    )
    note = f"{said[0].upper()}{said[1:]}. {note}" if said else note
    return Sheet(title, note, [("", len(columns))], columns, rows, labels)


def markdown(content: Found, sections: Sequence[Sheet]) -> str:
    """Every table; the first is that of the runs, with where they come from."""
    parts = ["# Results", *(sheet.markdown() for sheet in sections)]
    if content.runs:
        parts.append(tables.markdown(content.rows).split("\n\n")[-1])
    parts += ["# Beside the paper", *(sheet.markdown() for sheet in papers(content))]
    if content.problems:
        parts += ["# Problems", "\n".join(f"- {plain(problem)}" for problem in content.problems)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def cards(content: Found) -> list[tuple[str, str]]:
    """The headline: what is lost and gained at keep rate 0.7, fused; a value and what it is."""
    found = []
    for title, points in compare.ours(content).items():
        for point in sorted(points, key=lambda p: -p.runs):
            dense = dense_of(point, points)
            if (point.rate, point.fusion) != (0.7, True) or not dense or point.start != SCRATCH:
                continue
            assert point.top1 is not None and dense.top1 is not None and point.macs and dense.macs
            text = f"top-1 for {1 - point.macs / dense.macs:.0%} fewer MACs: {group(point)}, "
            text += f"keep rate 0.7, {title}"
            text += f"; mean of {point.runs} runs" * (point.runs > 1)
            found.append((f"{signed(point.top1 - dense.top1)} points", text))
            break
    for name, model in dict(keep_rate_deit_s="DeiT-S", keep_rate_lvvit_s="LV-ViT-S").items():
        way, pairs = compare.pairs(content, name)
        for row, own in pairs:
            if own and own.speed and row.fusion and row.rate in (0.7, 0.5):
                text = f"as fast as dense {model} at keep rate {row.rate}, fused (paper: "
                found.append((f"{own.speed:.2f} times", f"{text}{row.speed:.2f}); {way}"))
    return found
