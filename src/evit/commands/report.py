"""src/report.py: every finished run beside the paper."""

import json
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from evit.report import collect, settings, tables
from evit.report.collect import Found


def run(cfg: DictConfig) -> None:
    """What src/report.py does."""
    write(Path(cfg.runs), cfg.target and Path(cfg.target), cfg.page)


def write(source: Path, target: Path | None, page: bool = True) -> None:
    """Print the tables of the runs below a folder, or of a runs.json; write the report to target.

    Args:
        page: whether to write the page and figures, or table.md and runs.json alone.

    Raises:
        ValueError: nothing has finished there.
    """
    content = collect.read(source)
    groups = settings.ours(content).groupby("section", sort=False)
    sections = [tables.all_settings(str(title), points) for title, points in groups]
    written = {"table.md": tables.report(content, sections, [])}
    print(written["table.md"])
    if not target:
        return
    written["runs.json"] = json.dumps([*content.runs.values()], indent=1) + "\n"
    if page:
        from evit.report.page import build, html, save  # with matplotlib and plotly

        report = build(content)
        sections = [section.table for section in report.sections]
        del written["table.md"]
        written["tables.md"] = tables.report(content, sections, report.papers)
        written["index.html"] = html(content, report)
        written["runs.csv"] = as_csv(content)
        for chart in report.charts:
            save(chart, target / "figures")
    target.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (target / name).write_text(text)
    print("  ".join(f"{target}/{name}" for name in written))


def as_csv(content: Found) -> str:
    """A line for each run; no text in it is a spreadsheet's formula."""
    frame = pd.json_normalize([dict(run=name) | row for name, row in content.runs.items()])
    formula = set("=+-@")
    frame = frame.map(lambda c: f"'{c}" if isinstance(c, str) and c[:1] in formula else c)
    return frame.to_csv(index=False, lineterminator="\r\n")
