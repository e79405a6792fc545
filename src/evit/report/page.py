"""index.html: charts, tables and pictures of what has finished, beside the paper."""

import base64
from dataclasses import dataclass, field
from importlib import resources

import jinja2
import plotly.offline

from evit.report import charts, paper, settings, tables
from evit.report.collect import Found, Run
from evit.report.figures import Chart
from evit.report.tables import Table


@dataclass
class Section:
    """What can be compared with each other: the settings of one data set and image size."""

    title: str
    table: Table
    charts: list[Chart] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)  # captions and data URIs


@dataclass
class Report:
    """Everything on the page."""

    sections: list[Section]
    paper: list[Chart]
    papers: list[Table]

    @property
    def charts(self) -> list[Chart]:
        return self.paper + [chart for section in self.sections for chart in section.charts]


def build(content: Found) -> Report:
    """Make the tables and charts: sections for each data set and for reducers, and the paper."""
    points = settings.ours(content)
    sections, reducers = [], []
    for index, (key, own) in enumerate(points.groupby("section", sort=False)):
        title = str(key)
        names = dict(zip(own.setting, charts.names(own), strict=True))
        runs = [run for run in content.runs if settings.section(run.row) == title]
        sparse = [run for run in runs if run.picture and run.row["reducer"] != "none"]
        firsts = {run.row["setting"]: run for run in reversed(sparse)}
        pictures = [(names[run.row["setting"]], data_uri(run)) for run in firsts.values()]
        made = charts.relative(index, own), charts.curves(index, runs, names)
        table = tables.all_settings(title, own)
        sections.append(Section(title, table, [c for c in made if c], pictures[::-1]))
        if len(alike := charts.comparable(own)):
            table = tables.all_settings(f"Reducers on {title}", alike, by="reducer")
            reducers.append(Section(table.title, table, [charts.reducers(index, title, alike)]))
    beside = [charts.imagenet(content, points), charts.other_models(content)]
    papers = [tables.beside_paper(content, points, name) for name in paper.tables()]
    return Report(sections + reducers, beside, papers)


def data_uri(run: Run) -> str:
    return "data:image/webp;base64," + base64.b64encode(run.picture or b"").decode()


def html(content: Found, report: Report) -> str:
    """Render the page as one file, which fetches nothing."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evit.report", "template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources.files("evit.report").joinpath("template")
    return environment.get_template("page.html").render(
        report=report,
        problems=content.problems,
        provenance=tables.provenance(content.rows) if content.runs else "",
        rows=content.rows,
        drawn=[chart.json() for chart in report.charts],
        css=folder.joinpath("page.css").read_text(),
        script=folder.joinpath("page.js").read_text(),
        plotly=plotly.offline.get_plotlyjs(),
    )
