"""Every finished run beside the paper: src/report.py here, src/dashboard.py on W&B."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

KEYS = ("model", "reducer", "keep_rate", "fusion", "img_size", "macs", "throughput", "top1", "top5")


def run(cfg: DictConfig) -> None:
    """What src/report.py does."""
    write(Path(cfg.runs), cfg.target and Path(cfg.target), cfg.page)


def write(source: Path, target: Path | None, page: bool = True) -> None:
    """Print the tables of the runs below a folder, or of a runs.json; write the report to target.

    Without `page`, that is table.md and runs.json alone. ValueError: nothing has finished there.
    """
    from evit.report import collect, settings, tables  # with pandas

    content = collect.read(source)
    points = settings.ours(content)
    found = tables.of_settings(points)
    written = {"table.md": tables.report(content, found, [])}
    print(written["table.md"])
    if not target:
        return
    if page:
        from evit.report.page import html  # with plotly

        text = tables.report(content, found, tables.of_paper(content, points))
        written = {"tables.md": text, "index.html": html(content)}
    written["runs.json"] = json.dumps([*content.runs.values()], indent=1) + "\n"
    target.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (target / name).write_text(text)
    print("  ".join(f"{target}/{name}" for name in written))


def dashboard(cfg: DictConfig) -> None:
    """Save a workspace of a project on W&B.

    ValueError: the user is not logged in, a package is missing, or W&B cannot be reached.
    """
    import wandb

    from evit.tracking import wandb_mode

    if wandb_mode("auto") != "online":
        way = "run wandb login (.venv/bin/wandb), then this again; make sync uploads offline runs"
        raise ValueError(f"you are not logged in to W&B: {way}. src/report.py compares without it")
    try:
        print(workspace(cfg.entity or wandb.Api().default_entity or "", cfg.project).save().url)
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'evit-lab[dashboard]'") from error
    except Exception as error:  # W&B raises many types
        raise ValueError(f"W&B refuses, or cannot be reached: {error}") from error


def workspace(entity: str, project: str) -> Any:
    """Build the workspace of a project, not saved."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def scatter(x: str, title: str) -> Any:
        return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric("top1"))

    metrics = ("val/top1", "val/loss", "train/loss", "keep_rate", "tokens_per_image")
    by_cost = scatter("macs", "top-1 by multiply-accumulates of an image")
    panels = {
        "Accuracy and cost": [by_cost, scatter("throughput", "top-1 by images/s")],
        "Training": [wr.LinePlot(title=m, x="trainer/global_step", y=[m]) for m in metrics],
        "Patches that survive": [wr.MediaBrowser(media_keys=["kept_patches"])],
    }
    columns = ["run:displayName", "run:group", *(f"summary:{key}" for key in KEYS)]
    order = [ws.Ordering(ws.Summary("top1"), ascending=False)]
    return ws.Workspace(
        entity=entity,
        project=project,
        name="EViT Lab",
        sections=[ws.Section(name=n, panels=p, is_open=True) for n, p in panels.items()],
        runset_settings=ws.RunsetSettings(order=order, pinned_columns=columns),
    )
