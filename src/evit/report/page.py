"""index.html: charts, tables and pictures of what has finished, beside the paper."""

import base64
from dataclasses import dataclass
from importlib import resources

import jinja2
import plotly.offline

from evit.report import compare, figures, sheets
from evit.report.charts import Chart, imagenet, relative
from evit.report.curves import curves
from evit.report.field import other_models
from evit.report.found import Found, Run
from evit.report.sheets import Sheet


@dataclass
class Section:
    """The runs that can be compared with each other: of one data set and image size."""

    title: str
    charts: list[Chart]
    sheet: Sheet
    pictures: list[tuple[str, str]]  # a caption, and a data URI


def build(content: Found) -> tuple[list[Chart], list[Section]]:
    """The charts with the paper's numbers, and a section for each data set."""
    sections = []
    names = setting_names(content.runs)
    points = compare.ours(content)
    for index, (title, own) in enumerate(points.items()):
        runs = [run for run in content.runs if compare.section(run.row, run.row) == title]
        both = relative(index, own), curves(index, runs, names)
        sparse = [run for run in runs if run.picture and compare.rate(run.row["keep_rate"]) != 1]
        firsts = {run.row["setting"]: run for run in reversed(sparse)}
        pictures = [(names[key], data_uri(run.picture)) for key, run in firsts.items()]
        sheet = sheets.runs(title, own)
        sections.append(Section(title, [c for c in both if c], sheet, pictures[::-1]))
    return [imagenet(content), other_models(content)], sections


def setting_names(runs: list[Run]) -> dict[str, str]:
    """A name for each setting's hash; where others have the same, with the folder, or the hash."""
    plain: dict[str, list[str]] = {}
    for row in {run.row["setting"]: run.row for run in runs}.values():
        rate = compare.rate(row["keep_rate"])
        parts = [row["model"], "dense" if rate == 1 else f"keep rate {row['keep_rate']}"]
        parts += ["fused" if row["fusion"] else "dropped"] * (rate != 1)
        parts += ["fine-tuned"] * row["from_checkpoint"] + [
            f"{row['epochs']} epoch" + "s" * (row["epochs"] > 1)
        ]
        plain.setdefault(", ".join(parts), []).append(row["setting"])
    folders = {run.row["setting"]: run.folder for run in runs}
    names = {}
    for name, keys in plain.items():
        places = [folders[key] for key in keys]
        for key, place in zip(keys, places, strict=True):
            unique = place if places.count(place) == 1 else key
            names[key] = f"{name}, {unique}" if len(keys) > 1 else name
    return names


def data_uri(content: bytes | None) -> str:
    return "data:image/webp;base64," + base64.b64encode(content or b"").decode()


def html(content: Found, charts: list[Chart], sections: list[Section]) -> str:
    """One file: nothing in it is fetched from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evit.report", "template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = [figures.interactive(c) for c in charts + [c for s in sections for c in s.charts]]
    folder = resources.files("evit.report").joinpath("template")
    return environment.get_template("page.html").render(
        cards=sheets.cards(content),
        charts=charts,
        papers=sheets.papers(content),
        sections=sections,
        problems=content.problems,
        commits=sorted({str(row["commit"]) for row in content.rows}),
        devices=sorted({row["device"] for row in content.rows}),
        count=len(content.runs),
        rows=content.rows,
        drawn=drawn,
        css=folder.joinpath("page.css").read_text(),
        script=folder.joinpath("page.js").read_text(),
        plotly=plotly.offline.get_plotlyjs(),
    )
