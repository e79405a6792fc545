"""index.html: charts, tables and pictures of what has finished, beside the paper."""

import base64
from typing import Any, NamedTuple

import jinja2
import plotly.offline

from evit.report import charts, paper, settings, tables
from evit.report.collect import Found


class Section(NamedTuple):
    """What can be compared with each other, as the settings of one data set and image size."""

    table: tables.Table
    charts: list[dict[str, Any]]
    pictures: list[tuple[str, str]] = []  # captions and data URIs


class Report(NamedTuple):
    """Everything on the page."""

    sections: list[Section]
    paper: dict[str, Any]  # the chart of ImageNet
    papers: list[tables.Table]

    @property
    def charts(self) -> list[dict[str, Any]]:
        return [self.paper, *(chart for section in self.sections for chart in section.charts)]


def build(content: Found) -> Report:
    """Make the tables and charts: sections for each data set and for reducers, and the paper."""
    points = settings.ours(content)
    sections, reducers = [], []
    for index, (title, own) in enumerate(points.groupby("section", sort=False)):
        made = [] if title == "ImageNet" else [charts.accuracy(f"accuracy-{index}", title, own)]
        made = [c for c in (*made, charts.curves(f"curves-{index}", content, own)) if c["views"]]
        sections.append(Section(tables.all_settings(title, own), made, pictures(content, own)))
        if len(alike := charts.comparable(own)):
            table = tables.all_settings(f"Reducers on {title}", alike, by="reducer")
            chart = charts.accuracy(f"reducers-{index}", table.title, alike)
            reducers.append(Section(table, [chart]))
    whole = charts.accuracy("imagenet", "ImageNet", points[points.section == "ImageNet"])
    papers = [tables.beside_paper(content, points, name) for name in paper.TABLES]
    return Report(sections + reducers, whole, papers)


def pictures(content: Found, points: Any) -> list[tuple[str, str]]:
    """The picture of the first run of each setting that reduces, as a data URI, and its name."""
    sparse = points[points.rate != settings.DENSE]
    names, found = dict(zip(points.setting, charts.names(points), strict=True)), {}
    for name, run in reversed(content.runs.items()):
        if run["setting"] in set(sparse.setting) and name in content.pictures:
            uri = "data:image/webp;base64," + base64.b64encode(content.pictures[name]).decode()
            found[names[run["setting"]]] = uri
    return list(found.items())


def html(content: Found, report: Report) -> str:
    """Render the page as one file, which fetches nothing."""
    loader = jinja2.PackageLoader("evit.report", "template")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    return environment.get_template("page.html").render(
        report=report,
        problems=content.problems,
        provenance=tables.provenance(content) if content.runs else "",
        rows=list(content.runs.values()),
        plotly=plotly.offline.get_plotlyjs(),
    )
