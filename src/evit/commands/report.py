"""Every finished run beside the paper: src/report.py here, src/dashboard.py on W&B."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from evit.report import collect, settings, tables
from evit.report.collect import Found

KEYS = ("model", "reducer", "keep_rate", "fusion", "img_size", "macs", "throughput", "top1", "top5")


def run(cfg: DictConfig) -> None:
    """What src/report.py does."""
    write(Path(cfg.runs), cfg.target and Path(cfg.target), cfg.page)


def write(source: Path, target: Path | None, page: bool = True) -> None:
    """Print the tables of the runs below a folder, or of a runs.json; write the report to target.

    Without `page`, that is table.md and runs.json alone. ValueError: nothing has finished there.
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
        from evit.report.charts import save  # matplotlib, plotly, which only the page needs
        from evit.report.page import build, html

        built = build(content)
        sections = [section.table for section in built.sections]
        del written["table.md"]
        written["tables.md"] = tables.report(content, sections, built.papers)
        written["index.html"] = html(content, built)
        written["runs.csv"] = as_csv(content)
        for chart in built.charts:
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


def dashboard(cfg: DictConfig) -> None:
    """Save a workspace of a project on W&B; a ValueError if that cannot be."""
    import wandb

    from evit.tracking import wandb_mode

    if wandb_mode("auto") != "online":
        way = "run wandb login (.venv/bin/wandb), then this again; make sync uploads offline runs"
        raise ValueError(f"you are not logged in to W&B: {way}. src/report.py compares without it")
    try:
        entity: str = cfg.entity or wandb.Api().default_entity or ""
        print(workspace(entity, cfg.project).save().url)
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'evit-lab[dashboard]'") from error
    except Exception as error:  # W&B raises many types
        raise ValueError(f"W&B refuses, or cannot be reached: {error}") from error


def workspace(entity: str, project: str) -> Any:
    """Build the workspace of a project, not saved."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    wide, metrics = wr.Layout(w=24, h=9), "val/top1 val/loss train/loss keep_rate tokens_per_image"
    columns = [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key)) for key in KEYS]
    x_axes = dict(macs="multiply-accumulates of an image", throughput="images/s")
    cost: list[Any] = [
        wr.ScatterPlot(
            title=f"top-1 by {title}",
            x=wr.SummaryMetric(x),
            y=wr.SummaryMetric("top1"),
            layout=wr.Layout(w=12, h=9),
        )
        for x, title in x_axes.items()
    ]
    pictures = wr.MediaBrowser(media_keys=["kept_patches"], gallery_axis="step", layout=wide)
    panels: dict[str, list[Any]] = {
        "Accuracy and cost": [*cost, wr.ParallelCoordinatesPlot(columns=columns, layout=wide)],
        "Training": [wr.LinePlot(title=m, x="trainer/global_step", y=[m]) for m in metrics.split()],
        "Patches that survive": [pictures],
    }
    sections = [ws.Section(name=n, panels=p, is_open=True) for n, p in panels.items()]
    pinned = ["run:displayName", "run:group", *(f"summary:{key}" for key in KEYS)]
    order = [ws.Ordering(ws.Summary("top1"), ascending=False)]
    runs = ws.RunsetSettings(order=order, pinned_columns=pinned)
    where: Any = dict(entity=entity, project=project, name="EViT Lab")
    return ws.Workspace(**where, sections=sections, runset_settings=runs)
