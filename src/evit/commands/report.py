"""Every finished run beside the paper: src/report.py here, src/dashboard.py on W&B."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

KEYS = ("model", "reducer", "keep_rate", "fusion", "img_size", "macs", "throughput", "top1", "top5")


def run(cfg: DictConfig) -> None:
    write(Path(cfg.runs), cfg.target and Path(cfg.target), cfg.page)


def write(source: Path, target: Path | None, page: bool = True) -> None:
    """Print the tables of the runs below a folder or of a runs.json; write the report to target."""
    from evit.report import collect, tables  # with pandas

    points = tables.ours(content := collect.read(source))
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
    """Save a workspace of a project on W&B; a ValueError says why it cannot be."""
    import wandb

    from evit.tracking import wandb_mode

    if wandb_mode("auto") != "online":
        raise ValueError("not logged in to W&B: run wandb login first, or src/report.py without it")
    try:
        print(workspace(cfg.entity or wandb.Api().default_entity or "", cfg.project).save().url)
    except Exception as error:  # W&B raises many types
        raise ValueError(f"the workspace cannot be saved on W&B: {error}") from error


def workspace(entity: str, project: str) -> Any:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    metrics = "val/top1 val/loss train/loss keep_rate tokens_per_image".split()
    top1 = wr.SummaryMetric("top1")
    costs = dict(macs="multiply-accumulates of an image", throughput="images/s")
    panels: dict[str, list[Any]] = {
        "Accuracy and cost": [
            wr.ScatterPlot(title=f"top-1 by {title}", x=wr.SummaryMetric(x), y=top1)
            for x, title in costs.items()
        ],
        "Training": [wr.LinePlot(title=m, x="trainer/global_step", y=[m]) for m in metrics],
        "Patches that survive": [wr.MediaBrowser(media_keys=["kept_patches"])],
    }
    sections = [ws.Section(name=n, panels=p, is_open=True) for n, p in panels.items()]
    columns = ["run:displayName", "run:group", *(f"summary:{key}" for key in KEYS)]
    order = [ws.Ordering(ws.Summary("top1"), ascending=False)]
    runs = ws.RunsetSettings(order=order, pinned_columns=columns)
    where: Any = dict(entity=entity, project=project, name="EViT Lab")
    return ws.Workspace(**where, sections=sections, runset_settings=runs)
