"""Every finished run beside the paper: src/report.py here, src/dashboard.py on W&B."""

import json
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from evit.report import paper

KEYS = ("model", "reducer", "keep_rate", "fusion", "img_size", "macs", "throughput", "top1", "top5")
ACCURACY = "Accuracy and cost"


def run(cfg: DictConfig) -> None:
    """What src/report.py does."""
    write(Path(cfg.runs), cfg.target and Path(cfg.target), cfg.page)


def write(source: Path, target: Path | None, page: bool = True) -> None:
    """Print the tables of the runs below a folder, or of a runs.json; write the report to target.

    Without `page`, that is table.md and runs.json alone. ValueError: nothing has finished there.
    """
    from evit.report import collect, settings, tables  # with pandas

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


def as_csv(content: Any) -> str:
    """A line for each run; no text in it is a spreadsheet's formula."""
    import pandas as pd

    frame = pd.json_normalize([dict(run=name) | row for name, row in content.runs.items()])
    formula = set("=+-@")
    frame = frame.map(lambda c: f"'{c}" if isinstance(c, str) and c[:1] in formula else c)
    return frame.to_csv(index=False, lineterminator="\r\n")


def dashboard(cfg: DictConfig) -> None:
    """Save a workspace and a report of a project on W&B; with cfg.paper the published rows too.

    ValueError: the user is not logged in, a package is missing, or W&B cannot be reached.
    """
    import wandb

    from evit.tracking import wandb_mode

    if wandb_mode("auto") != "online":
        way = "run wandb login (.venv/bin/wandb), then this again; make sync uploads offline runs"
        raise ValueError(f"you are not logged in to W&B: {way}. src/report.py compares without it")
    try:
        entity: str = cfg.entity or wandb.Api().default_entity or ""
        if cfg.paper:
            rows = paper_runs()
            log_paper(rows, project=cfg.project, entity=entity, mode="online")
            print(f"{len(rows)} rows of the paper are in {entity}/{cfg.project}, group paper")
        for made in workspace(entity, cfg.project), report(entity, cfg.project):
            print(made.save().url)
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'evit-lab[dashboard]'") from error
    except Exception as error:  # W&B raises many types
        raise ValueError(f"W&B refuses, or cannot be reached: {error}") from error


def paper_runs() -> list[dict[str, Any]]:
    """The published rows, with the summary keys of runs and a name, each once."""
    found: dict[str, dict[str, Any]] = {}
    for row in paper.training_runs():
        dense, fusion = row["keep_rate"] == 1, row["fusion"]
        own = dict(model=paper.MODEL_LIST[row["model"]]["conf"][0 if dense else -1])
        own |= dict(reducer="none" if dense else row["reducer"])
        own |= dict(fusion=bool(fusion), macs=row["macs"] * 1e9)
        name = f"{row['model']} {row['keep_rate']} {row['img_size']} px"
        name = name if fusion is None else f"evit_{name}"
        name += "" if dense else " fused" if fusion else " dropped"
        if "params" in row:  # only in the table of fine-tuned models
            start = "from DeiT" if row["finetuned"] else "from scratch"
            name += f" {row['epochs']} epochs {start}"
        found.setdefault(name, {key: row.get(key) for key in KEYS} | own | dict(name=name))
    return list(found.values())


def log_paper(rows: list[dict[str, Any]], **where: Any) -> None:
    """Add rows to a project as runs of group paper; a second time they are replaced."""
    import wandb

    kind: Any = dict(group="paper", job_type="paper", resume="allow", reinit="finish_previous")
    kind |= where | dict(settings=wandb.Settings(silent=True))
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            name = row["name"]
            config = {key: row[key] for key in ("keep_rate", "fusion", "img_size")}
            key = "paper-" + "-".join(name.replace(".", "").split())
            tracked = wandb.init(id=key, name=name, config=config, dir=folder, **kind)
            tracked.summary.update({k: value for k, value in row.items() if k != "name"})
            tracked.finish()


def workspace(entity: str, project: str) -> Any:
    """Build the workspace of a project, not saved."""
    import wandb_workspaces.workspaces as ws

    columns = ["run:displayName", "run:group", *(f"summary:{key}" for key in KEYS)]
    order = [ws.Ordering(ws.Summary("top1"), ascending=False)]
    sections = [ws.Section(name=n, panels=p, is_open=True) for n, p in all_panels().items()]
    runs = ws.RunsetSettings(order=order, pinned_columns=columns)
    where: Any = dict(entity=entity, project=project, name="EViT Lab")
    return ws.Workspace(**where, sections=sections, runset_settings=runs)


def report(entity: str, project: str) -> Any:
    """Build the report of a project, not saved: our runs and the paper's, in two colours."""
    import wandb_workspaces.reports.v2 as wr

    where: Any = dict(entity=entity, project=project)
    ours = wr.Runset(**where, name="runs", filters="JobType != 'paper'")
    theirs = wr.Runset(**where, name="paper", filters="JobType = 'paper'")
    blocks: list[Any] = [wr.TableOfContents()]
    for name, panels in all_panels().items():
        runs = [ours, theirs] if name == ACCURACY else [ours]
        blocks += [wr.H1(name), wr.PanelGrid(runsets=runs, panels=panels)]
    about = "Accuracy and cost of every run, beside the rows of the paper."
    return wr.Report(**where, title="EViT Lab", description=about, blocks=blocks, width="fluid")


def all_panels() -> dict[str, list[Any]]:
    """The panels of each section."""
    import wandb_workspaces.reports.v2 as wr

    def scatter(x: str, title: str) -> Any:
        metrics: Any = dict(x=wr.SummaryMetric(x), y=wr.SummaryMetric("top1"))
        return wr.ScatterPlot(title=title, layout=wr.Layout(w=12, h=9), **metrics)

    metrics = ("val/top1", "val/loss", "train/loss", "keep_rate", "tokens_per_image")
    columns = [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key)) for key in KEYS]
    wide = wr.Layout(w=24, h=9)
    pictures = wr.MediaBrowser(media_keys=["kept_patches"], gallery_axis="step", layout=wide)
    return {
        ACCURACY: [
            scatter("macs", "top-1 by multiply-accumulates of an image"),
            scatter("throughput", "top-1 by images/s"),
            wr.ParallelCoordinatesPlot(columns=columns, layout=wide),
        ],
        "Training": [wr.LinePlot(title=m, x="trainer/global_step", y=[m]) for m in metrics],
        "Patches that survive": [pictures],
    }
