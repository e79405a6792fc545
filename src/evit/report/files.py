"""What src/report.py leaves: the page, tables.md, runs.csv, runs.json and figures/."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from evit.report import found, sheets, tables
from evit.report.found import Found


def write(source: Path, target: Path | None, page: bool = True) -> None:
    """Print the table of the runs below a folder, and what is wrong; write the report.

    Args:
        source: a folder, or a runs.json.
        target: the folder of the report; without it nothing is written.
        page: else only table.md and runs.json are written.

    Raises:
        ValueError: nothing has finished there.
    """
    content = found.read(source)
    table = tables.markdown(content.rows) if content.runs else "No run has finished.\n"
    print(table)
    for problem in content.problems:
        print(f"problem: {problem}")
    if not target:
        return
    target.mkdir(parents=True, exist_ok=True)
    written = {"runs.json": json.dumps(content.rows, indent=1) + "\n"}
    if page:
        from evit.report import figures  # and plotly, matplotlib: for the page alone
        from evit.report.page import build, html

        charts, sections = build(content)
        written["index.html"] = html(content, charts, sections)
        written["tables.md"] = sheets.markdown(content, [s.sheet for s in sections])
        written["runs.csv"] = as_csv(content)
        for chart in charts + [chart for section in sections for chart in section.charts]:
            figures.save(chart, target / "figures")
    else:
        written["table.md"] = table
    for name, text in written.items():
        (target / name).write_text(text)
    print("  ".join(f"{target}/{name}" for name in written))


def as_csv(content: Found) -> str:
    """A line for each run; versions of packages are columns too."""
    rows: list[dict[str, Any]] = []
    for run in content.runs:
        versions = {f"packages.{name}": text for name, text in run.row["packages"].items()}
        row = {key: value for key, value in run.row.items() if key != "packages"}
        rows.append(dict(run=run.name) | row | versions)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows({key: no_formula(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def no_formula(value: Any) -> Any:
    """Text that a spreadsheet does not take for something to compute."""
    return (
        f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
    )


def run(cfg: Any) -> None:
    """What src/report.py does."""
    write(Path(cfg.runs), Path(cfg.target) if cfg.target else None, cfg.page)
