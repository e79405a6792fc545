"""The tables of the report, as Markdown and for the page."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from evit.report import markdown, paper, plain, settings
from evit.report.collect import Found

NOT_RUN = "not run"
METRICS = (  # of a table of the paper: title, column, decimals
    ("top-1 (%)", "top1", 1),
    ("top-5 (%)", "top5", 1),
    ("speed-up (x dense)", "faster", 2),
    ("GMACs", "macs", 1),
)
NUMBERS = {  # of our settings: column, format
    "to dense": ("change", "+.2f"),
    "top-5 (%)": ("top5", ".2f"),
    "KL to dense": ("kl", ".4f"),
    "GMACs": ("macs", ".4g"),
    "M parameters": ("params", ".2f"),
    "% of dense": ("share", ".0f"),
    "speed-up": ("faster", ".2f"),
}
NOTES = {  # by column
    "top-1 (%)": "The mean over the seeds of a setting, with the standard deviation.",
    "to dense": "To dense: points of top-1 beside the dense runs of the same recipe, or beside the "
    "model that was fine-tuned or evaluated.",
    "speed-up": "Speed-up: images/s beside the dense model's, by src/benchmark.py or by the runs.",
}


class Table(NamedTuple):
    """A table of texts, whose first `labels` columns say what a row is."""

    title: str
    note: str
    frame: pd.DataFrame
    labels: int

    def markdown(self) -> str:
        text = markdown(self.frame.to_dict("records"))
        return f"**{plain(self.title)}**\n\n{text}\n\n{plain(self.note)}"


def beside_paper(content: Found, points: pd.DataFrame, name: str) -> Table:
    """Make a table of the paper: each number, ours, and ours less the paper's."""
    way, theirs, own = settings.beside_paper(content, points, name)
    which = labels(theirs)[["model", "weights", "epochs", "keep rate", "the rest", "px"]]
    shown = {k: v for k, v in which.items() if k == "keep rate" or v[v != ""].nunique() > 1}
    count = len(shown)
    for title, key, digits in METRICS:
        if theirs[key].notna().any():
            shown[f"{title}: paper"] = texts(theirs[key], f".{digits}f", "-")
            shown[f"{title}: ours"] = texts(own[key], f".{max(digits, 2)}f", NOT_RUN)
            shown[f"{title}: difference"] = texts(own[key] - theirs[key], "+.2f")
            if key == "top1":
                seeds = own.apply(lambda row: f"{top1_text(row)}, {row.runs:.0f} runs", axis=1)
                shown[f"{title}: ours"] = shown[f"{title}: ours"].mask(own.spread.notna(), seeds)
    note = "Speed is relative to the dense model of the same table at 224 px"
    note += f", ours on {way}." if way else "; ours has not been measured (src/benchmark.py)."
    if name == "off_the_shelf":
        note = "The paper does not say what becomes of the other tokens."
    return Table(paper.TABLES[name]["title"], note, pd.DataFrame(shown), count)


def labels(points: pd.DataFrame) -> pd.DataFrame:
    """Write as texts what settings are."""
    return pd.DataFrame(
        {
            "model": points.model.replace(paper.TITLES),
            "reducer": points.reducer,
            "keep rate": points.rate,
            "the rest": points.rest,
            "kept": points.selection.mask(points.selection + points.reducer == "evit", "attentive"),
            "px": points.img_size.map(str),
            "weights": points.start,
            "epochs": texts(points.epochs, ".0f"),
            "images": points.images.replace("", "all"),
            "recipe": settings.recipe_names(points),
            "runs": points.runs.map(str),
        }
    )


def texts(values: pd.Series, form: str, missing: str = "") -> pd.Series:
    """Write numbers as text, and -0.00 as +0.00."""
    shown = values.map(lambda value: missing if pd.isna(value) else format(value, form))
    return shown.str.replace(r"^-(0\.0+)$", r"+\1", regex=True)


def top1_text(point: pd.Series) -> str:
    return f"{point.top1:.2f}" + ("" if pd.isna(point.spread) else f" ± {point.spread:.2f}")


def all_settings(title: str, points: pd.DataFrame) -> Table:
    """Make the table of our settings on one data set, beside their dense models.

    A label that is the same in all rows stands in the note instead.
    """
    points = points.sort_values(["start", "macs"], ascending=[True, False], kind="stable")
    which = labels(points)
    others = which.drop(columns=["keep rate", "the rest"])
    found = {name: set(others[name]) for name in sorted(others)}
    for name in ("reducer", "kept"):  # which a dense model does not have
        found[name].discard("")
    same = {name: values for name, values in found.items() if len(values) < 2}
    said = [f"{name}: {value}" for name, values in same.items() for value in values if value]
    which = which.drop(columns=list(same))
    numbers = pd.DataFrame({"top-1 (%)": points.apply(top1_text, axis=1)})
    numbers = numbers.assign(**{k: texts(points[key], form) for k, (key, form) in NUMBERS.items()})
    numbers = numbers.loc[:, (numbers != "").any()]
    notes = [f"{'; '.join(said).capitalize()}.", *(NOTES[k] for k in numbers if k in NOTES)]
    return Table(title, " ".join(notes), which.join(numbers), len(which.columns))


def provenance(content: Found) -> str:
    """List the devices, commits and versions of torch of the runs."""
    found = [
        (row["device"], str(row["commit"]), str(row["packages"]["torch"]))
        for row in content.runs.values()
    ]
    each = (", ".join(sorted(set(values))) for values in zip(*found, strict=True))
    return plain("{}; commit {}; torch {}.".format(*each))


def report(content: Found, sections: Sequence[Table], papers: Sequence[Table]) -> str:
    """Write every table as Markdown, with the provenance of the runs, and the problems."""
    parts = ["# Results", *(table.markdown() for table in sections)]
    parts += [provenance(content) if content.runs else "No run has finished."]
    if papers:
        parts += ["# Beside the paper", *(table.markdown() for table in papers)]
    if content.problems:
        parts += ["# Problems", "\n".join(f"- {plain(problem)}" for problem in content.problems)]
    return "\n\n".join(parts) + "\n"
