"""The tables of the report, for the terminal, as Markdown and for the page."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from evit.report import paper, settings
from evit.report.collect import Found
from evit.report.rows import Row

NOT_RUN = "not run"
METRICS = (  # of a table of the paper: title, column, decimals
    ("top-1 (%)", "top1", 1),
    ("top-5 (%)", "top5", 1),
    ("speed-up (x dense)", "speed", 2),
    ("GMACs", "macs", 1),
)


@dataclass
class Table:
    """A table of texts whose first columns say what a row is; columns may be (group, name)."""

    title: str
    note: str
    frame: pd.DataFrame
    labels: int

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The titles over groups of columns, each with how many it spans."""
        titles = [name[0] if isinstance(name, tuple) else "" for name in self.frame]
        return [(title, titles.count(title)) for title in dict.fromkeys(titles)]

    @property
    def columns(self) -> list[str]:
        return [name[1] if isinstance(name, tuple) else name for name in self.frame]

    def markdown(self) -> str:
        names = (name if isinstance(name, tuple) else ("", name) for name in self.frame)
        text = markdown([" ".join(name).strip() for name in names], self.frame.values)
        return f"**{plain(self.title)}**\n\n{text}\n\n{plain(self.note)}\n"


def markdown(head: Sequence[str], body: Iterable[Iterable[str]]) -> str:
    first, *others = ("| " + " | ".join(map(plain, cells)) + " |" for cells in (head, *body))
    return "\n".join([first, "|" + "---|" * len(head), *others])


def plain(text: str) -> str:
    """Text without what Markdown, or HTML in it, would take for its own."""
    return re.sub(r"([|\[])", r"\\\1", text).replace("<", "&lt;")


def beside_paper(content: Found, points: pd.DataFrame, name: str) -> Table:
    """Make a table of the paper: each number, ours, and ours less the paper's."""
    way, theirs, own = settings.beside_paper(content, points, name)
    models = name == "dynamicvit_deit_s"
    columns = {("", "model"): theirs.model.map(paper.TITLES), ("", "weights"): theirs.start}
    columns |= {("", "epochs"): theirs.epochs.map("{:.0f}".format)}
    columns = columns if models else {}
    columns["", "keep rate"] = theirs.rate.map(rate_text)
    if theirs.rest.replace("", None).nunique() > 1 and not models:
        columns["", "the rest"] = theirs.rest
    if theirs.img_size.nunique() > 1:
        columns["", "px"] = theirs.img_size.map(str)
    labels = len(columns)
    for title, key, digits in METRICS:
        if theirs[key].isna().all():
            continue
        columns[title, "paper"] = theirs[key].map(lambda x, n=digits: number(x, n, "-"))
        columns[title, "ours"] = own[key].map(lambda x, n=digits: number(x, max(n, 2), NOT_RUN))
        columns[title, "difference"] = (own[key] - theirs[key]).map(signed)
        if key == "top1":
            several = own.spread.notna()
            text = own.apply(lambda row: f"{top1_text(row)}, {row.runs:.0f} runs", axis=1)
            columns[title, "ours"] = columns[title, "ours"].mask(several, text)
    note = "Speed is relative to the dense model of the same table at 224 px"
    note += f", ours on {way}." if way else "; ours has not been measured (src/benchmark.py)."
    if name == "off_the_shelf":
        note = "The paper does not say what becomes of the other tokens."
    return Table(paper.tables()[name]["title"], note, pd.DataFrame(columns), labels)


def rate_text(rate: object) -> str:
    return "dense" if rate == 1 else settings.label(rate)


def number(value: float, digits: int, missing: str = "") -> str:
    return missing if pd.isna(value) else f"{value:.{digits}f}"


def signed(difference: float) -> str:
    return "" if pd.isna(difference) else f"{round(difference, 2) + 0.0:+.2f}"  # no -0.00


def top1_text(point: pd.Series) -> str:
    return f"{point.top1:.2f}" + ("" if pd.isna(point.spread) else f" ± {point.spread:.2f}")


def all_settings(title: str, points: pd.DataFrame, by: str = "start") -> Table:
    """Make the table of our settings on one data set, beside their dense models.

    A column whose value is the same everywhere is said below the table instead.
    """
    points = settings.with_dense(points).sort_values(
        [by, "macs"], ascending=[True, False], kind="stable"
    )
    which = {
        "model": points.model,
        "reducer": points.reducer,
        "keep rate": points.rate.map(rate_text),
        "the rest": points.rest,
        "kept": points.selection.mask((points.selection + points.reducer) == "evit", "attentive"),
        "px": points.img_size.map(str),
        "weights": points.start,
        "epochs": points.epochs.map(lambda count: number(count, 0)),
        "images": points.images.replace("", "all"),
        "recipe": points.recipe_name,
        "runs": points.runs.map(str),
    }
    usual = dict(reducer="evit", kept="attentive", images="all", recipe="")
    usual["px"] = title.removesuffix(" px").split()[-1]
    said = []
    for name in [name for name in which if name not in ("keep rate", "the rest")]:
        values = set(which[name]) - ({""} if name in ("reducer", "kept") else set())
        if len(values) < 2 and (len(points) > 1 or values <= {usual.get(name)}):
            del which[name]
            said += [f"{name}: {value}" for value in values - {usual.get(name), ""}]
    speed = points.speed.fillna(points.images_per_s / points.dense_images_per_s)
    numbers = {
        "top-1 (%)": points.apply(top1_text, axis=1),
        "to dense": (points.top1 - points.dense_top1).map(signed),
        "top-5 (%)": points.top5.map(lambda top5: number(top5, 2)),
        "KL to dense": points.kl.map(lambda kl: number(kl, 4)),
        "GMACs": points.macs.map("{:.4g}".format),
        "M parameters": points.params.map(lambda params: number(params, 2)),
        "% of dense": (100 * points.macs / points.dense_macs).map(lambda share: number(share, 0)),
        "speed-up": speed.map(lambda ratio: number(ratio, 2)),
    }
    numbers = {name: texts for name, texts in numbers.items() if texts.any()}
    note = (
        "The mean over the seeds of a setting, with the standard deviation. To dense: points from "
        "the mean of the dense runs by the same recipe; or from what was fine-tuned or evaluated. "
        "Speed-up: images/s beside the dense model's, by src/benchmark.py, else by the runs."
    )
    note = f"{'; '.join(said).capitalize()}. {note}" if said else note
    return Table(title, note, pd.DataFrame(which | numbers), len(which))


def provenance(found: list[Row]) -> str:
    """Say which devices, commits and versions of torch the runs are from."""
    columns = {
        "": {str(row["device"]) for row in found},
        "commit ": {str(row["commit"]) for row in found},
        "torch ": {str(row["packages"]["torch"]) for row in found},
    }
    texts = [name + ", ".join(sorted(values)) for name, values in columns.items()]
    return plain("; ".join(texts)) + "."


def report(content: Found, sections: Sequence[Table], papers: Sequence[Table]) -> str:
    """Every table as Markdown, with where the runs come from, and what could not be read."""
    parts = ["# Results", *(table.markdown() for table in sections)]
    parts += [provenance(content.rows)] if content.runs else ["No run has finished."]
    if papers:
        parts += ["# Beside the paper", *(table.markdown() for table in papers)]
    if content.problems:
        parts += ["# Problems", "\n".join(f"- {plain(problem)}" for problem in content.problems)]
    return "\n\n".join(part.strip() for part in parts) + "\n"
