"""index.html: charts, tables and pictures of what has finished, beside the paper."""

import base64
from typing import Any, NamedTuple

import jinja2
import plotly.offline

from evit.report import charts, paper, settings, tables
from evit.report.collect import Found


class Section(NamedTuple):
    """What can be compared with each other: the settings of one data set and image size."""

    title: str
    table: tables.Table
    charts: list[dict[str, Any]]
    pictures: list[tuple[str, str]] = []  # captions and data URIs


class Report(NamedTuple):
    """Everything on the page."""

    sections: list[Section]
    paper: list[dict[str, Any]]
    papers: list[tables.Table]

    @property
    def charts(self) -> list[dict[str, Any]]:
        return self.paper + [chart for section in self.sections for chart in section.charts]


def build(content: Found) -> Report:
    """Make the tables and charts: sections for each data set and for reducers, and the paper."""
    points = settings.ours(content)
    sections, reducers = [], []
    for index, (key, own) in enumerate(points.groupby("section", sort=False)):
        title = str(key)
        names = dict(zip(own.setting, charts.names(own), strict=True))
        runs = [run for run in content.runs if settings.section(run.row) == title]
        pictures = {}
        for run in reversed(runs):  # of each setting the first
            if run.picture and run.row["reducer"] != "none":
                uri = "data:image/webp;base64," + base64.b64encode(run.picture).decode()
                pictures[names[run.row["setting"]]] = uri
        cost = charts.costs(f"relative-{index}", title, content, own)
        made = cost if title != "ImageNet" else {}, charts.curves(index, runs, names)
        table = tables.all_settings(title, own)
        sections.append(
            Section(title, table, [c for c in made if c.get("views")], [*pictures.items()])
        )
        if len(alike := charts.comparable(own)):
            table = tables.all_settings(f"Reducers on {title}", alike, by="reducer")
            reducers.append(Section(table.title, table, [charts.reducers(index, title, alike)]))
    whole = charts.costs("imagenet", "ImageNet", content, points[points.section == "ImageNet"])
    beside = [whole, charts.other_models(content)]
    papers = [tables.beside_paper(content, points, name) for name in paper.TABLES]
    return Report(sections + reducers, beside, papers)


def html(content: Found, report: Report) -> str:
    """Render the page as one file, which fetches nothing."""
    loader = jinja2.PackageLoader("evit.report", "template")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        report=report,
        problems=content.problems,
        provenance=tables.provenance(content.rows) if content.runs else "",
        rows=content.rows,
        plotly=plotly.offline.get_plotlyjs(),
    )
