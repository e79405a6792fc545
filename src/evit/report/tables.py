"""The tables of the report, as Markdown and for the page."""

import pandas as pd

from evit.report import Row, markdown, paper, plain, settings
from evit.report.collect import Found

LABELS = dict(model="model", reducer="reducer", rate="keep rate", rest="the rest", selection="kept")
LABELS |= dict(img_size="px", start="weights", epochs="epochs", images="images", recipe="recipe")
LABELS |= dict(runs="runs")
METRICS = (  # of a table of the paper: title, column, format of theirs, of ours
    ("top-1 (%)", "top1", "{:.1f}", "{:.2f}"),
    ("top-5 (%)", "top5", "{:.1f}", "{:.2f}"),
    ("speed-up (x dense)", "faster", "{:.2f}", "{:.2f}"),
    ("GMACs", "macs", "{:.1f}", "{:.2f}"),
)
NUMBERS = {  # of our settings: column, format
    "to dense": ("change", "{:+.2f}"),
    "top-5 (%)": ("top5", "{:.2f}"),
    "KL to dense": ("kl", "{:.4f}"),
    "GMACs": ("macs", "{:.4g}"),
    "M parameters": ("params", "{:.2f}"),
    "% of dense": ("share", "{:.0f}"),
    "speed-up": ("faster", "{:.2f}"),
}
NOTES = {  # by column
    "top-1 (%)": "The mean over the seeds of a setting, with the standard deviation.",
    "to dense": "To dense: points of top-1 beside the dense runs of the same recipe, or beside the "
    "model that was fine-tuned or evaluated.",
    "speed-up": "Speed-up: images/s beside the dense model's, by src/benchmark.py or by the runs.",
}


def labels(points: pd.DataFrame) -> pd.DataFrame:
    """Write as texts what settings are; the recipe, a hash, only where nothing else differs."""
    keys = [points[key] for key in ("model", "start", "epochs", "img_size", "images")]
    recipes = points.recipe.replace("", None).groupby(keys, dropna=False).transform("nunique")
    shown = points.assign(
        model=points.model.replace(paper.TITLES),
        epochs=texts(points.epochs, "{:.0f}"),
        images=points.images.replace("", "all"),
        recipe=points.recipe.str[:8].where(recipes > 1, ""),
        runs=texts(points.runs, "{:.0f}"),
    )
    return shown[[*LABELS]].astype(str).rename(columns=LABELS)


def texts(values: pd.Series, form: str, missing: str = "") -> pd.Series:
    """Write numbers as text, and -0.00 as +0.00."""
    shown = values.map(lambda value: missing if pd.isna(value) else form.format(value))
    return shown.str.replace(r"^-(0\.0+)$", r"+\1", regex=True)


def of_settings(points: pd.DataFrame) -> list[Row]:
    """Make a table of our settings on each data set, beside their dense models.

    A label that is the same in all rows stands in the note instead.
    """
    found = []
    for title, own in points.groupby("section", sort=False):
        own = own.sort_values(["start", "macs"], ascending=[True, False], kind="stable")
        which, same = labels(own), []
        for name in which.columns.difference(["keep rate", "the rest"]):
            values = set(which[name])
            if name in ("reducer", "kept"):  # which a dense model does not have
                values.discard("")
            if len(values) < 2:
                del which[name]
                same += [f"{name}: {value}" for value in values if value]
        which["top-1 (%)"] = texts(own.top1, "{:.2f}") + texts(own.spread, " ± {:.2f}")
        numbers = pd.DataFrame({k: texts(own[key], form) for k, (key, form) in NUMBERS.items()})
        which = which.join(numbers.loc[:, (numbers != "").any()])
        notes = [f"{'; '.join(same).capitalize()}.", *(NOTES[k] for k in which if k in NOTES)]
        found.append(dict(title=title, note=" ".join(notes), frame=which))
    return found


def of_paper(content: Found, points: pd.DataFrame) -> list[Row]:
    """Make the tables of the paper: each number, ours, and ours less the paper's."""
    mine = points[(points.section == "ImageNet") & points.selection.isin(["", "attentive"])]
    mine = mine.assign(model=mine.model.map(paper.CONF))
    keys, found = "model reducer rate rest img_size start".split(), []
    for name, theirs in settings.published().groupby("table", sort=False):
        both = theirs[[*keys, "epochs"]].reset_index().merge(mine, on=keys, suffixes=("_paper", ""))
        # LV-ViT's 300 epochs are 310 with those at its last learning rate.
        fits = both.epochs.between(both.epochs_paper, 1.1 * both.epochs_paper)
        both = both[fits | both.epochs_paper.isna()].drop_duplicates("index").set_index("index")
        own, speeds = both.reindex(theirs.index), settings.measured(content, theirs)
        own = own.assign(faster=speeds.faster, macs=speeds.macs.fillna(own.macs))
        shown = labels(theirs)[["model", "weights", "epochs", "keep rate", "the rest", "px"]]
        differ = shown.replace("", None).nunique() > 1
        shown = shown.loc[:, differ | (shown.columns == "keep rate")]
        seeds = own.runs.where(own.spread.notna())
        for title, key, form, own_form in METRICS:
            if theirs[key].notna().any():
                numbers = texts(own[key], own_form, "not run")
                if key == "top1":
                    numbers += texts(own.spread, " ± {:.2f}") + texts(seeds, ", {:.0f} runs")
                shown[f"{title}: paper"] = texts(theirs[key], form, "-")
                shown[f"{title}: ours"] = numbers
                shown[f"{title}: difference"] = texts(own[key] - theirs[key], "{:+.2f}")
        way, about = next(iter(speeds.way.dropna()), ""), paper.TABLES[name]
        note = "Speed is relative to the dense model of the same table at 224 px"
        note += f", ours on {way}." if way else "; ours has not been measured (src/benchmark.py)."
        found.append(dict(title=about["title"], note=about.get("note", note), frame=shown))
    return found


def provenance(content: Found) -> str:
    """List the devices, commits and versions of torch of the runs."""
    if not (rows := content.runs.values()):
        return "No run has finished."
    found = [(row["device"], str(row["commit"]), str(row["packages"]["torch"])) for row in rows]
    each = (", ".join(sorted(set(values))) for values in zip(*found, strict=True))
    return "{}; commit {}; torch {}.".format(*each)


def report(content: Found, found: list[Row], papers: list[Row]) -> str:
    """Write every table as Markdown, with the provenance of the runs, and the problems."""

    def text(table: Row) -> str:
        rows = markdown(table["frame"].to_dict("records"))
        return f"**{plain(table['title'])}**\n\n{rows}\n\n{plain(table['note'])}"

    parts = ["# Results", *map(text, found), plain(provenance(content))]
    if papers:
        parts += ["# Beside the paper", *map(text, papers)]
    if content.problems:
        parts += ["# Problems", "\n".join(f"- {plain(problem)}" for problem in content.problems)]
    return "\n\n".join(parts) + "\n"
