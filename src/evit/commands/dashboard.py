"""A project's runs on W&B beside each other and beside the paper: a workspace and a report."""

import tempfile
from typing import Any

import wandb
from omegaconf import DictConfig

from evit.report import paper, results
from evit.tracking import wandb_mode

KEYS = ("model", "reducer", "keep_rate", "fusion", "img_size", "macs", "throughput", "top1", "top5")
ACCURACY = "Accuracy and cost"


def run(cfg: DictConfig) -> None:
    """Save the workspace and the report; with cfg.paper the published rows too, as runs.

    Raises:
        ValueError: the user is not logged in, a package is missing, or W&B cannot be reached.
    """
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'evit-lab[dashboard]'") from error
    if wandb_mode("auto") != "online":
        raise ValueError(
            "you are not logged in to W&B: run wandb login (.venv/bin/wandb), then this again; "
            "make sync uploads the runs that were tracked offline. Without W&B, src/report.py "
            "compares runs"
        )
    try:
        entity = cfg.entity or wandb.Api().default_entity
        if not entity:
            raise ValueError("W&B names no default entity of yours: entity=USER_OR_TEAM")
        if cfg.paper:
            rows = paper_runs()
            log_paper(rows, project=cfg.project, entity=entity, mode="online")
            print(f"{len(rows)} rows of the paper are in {entity}/{cfg.project}, group paper")
        for made in workspace(entity, cfg.project), report(entity, cfg.project):
            print(made.save().url)
    except ValueError:
        raise
    except Exception as error:  # of many types, in W&B
        raise ValueError(f"W&B refuses, or cannot be reached: {error}") from error


def paper_runs() -> list[dict[str, Any]]:
    """The published rows that say top-1, with the summary keys of runs, each once.

    `name` says what the row is; params only where the paper's table has it.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in paper.training_runs():
        dense, dynamic = row["keep_rate"] == 1, row["model"] not in paper.MODELS
        reducer = "none" if dense else results.reducer_name(None, row["model"])
        summary = {key: row.get(key) for key in KEYS} | dict(
            model=paper.MODEL_LIST[row["model"]]["conf"][0 if dense else -1],
            reducer=reducer,
            fusion=bool(row["fusion"]),
            macs=row["macs"] * 1e9,
        )
        words = ["" if dense or dynamic else "evit_", row["model"], f" {row['keep_rate']} "]
        words += [f"{row['img_size']} px"]
        words += [] if dense else [" fused" if row["fusion"] else " dropped"]
        if "params" in row:
            summary["params"] = row["params"] * 1e6
            start = "from DeiT" if row["finetuned"] else "from scratch"
            words += [f" {row['epochs']} epochs {start}"]
        label = "".join(words)
        found.setdefault(label, summary | dict(name=label))
    return list(found.values())


def log_paper(rows: list[dict[str, Any]], project: str, entity: str | None, mode: Any) -> None:
    """Add rows to a project as runs of group and job type paper; a second time they are replaced.

    They have the summary and, for filters, the configuration of a run.
    """
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            name = row["name"]
            summary = {key: value for key, value in row.items() if key != "name"}
            tracked = wandb.init(
                project=project,
                entity=entity,
                id="paper-" + "-".join(name.replace(".", "").split()),
                name=name,
                group="paper",
                job_type="paper",
                config={key: summary[key] for key in ("keep_rate", "fusion", "img_size")},
                dir=folder,
                mode=mode,
                resume="allow",
                reinit="finish_previous",
                settings=wandb.Settings(silent=True),
            )
            tracked.summary.update(summary)
            tracked.finish()


def workspace(entity: str, project: str) -> Any:
    """The workspace of a project, not saved."""
    import wandb_workspaces.workspaces as ws

    columns = ["run:displayName", "run:group", *(f"summary:{key}" for key in KEYS)]
    best_first = ws.Ordering(ws.Summary("top1"), ascending=False)
    sections = [
        ws.Section(name=name, panels=panels, is_open=True) for name, panels in all_panels().items()
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name="EViT Lab",
        sections=sections,
        runset_settings=ws.RunsetSettings(order=[best_first], pinned_columns=columns),
    )


def report(entity: str, project: str) -> Any:
    """The report of a project, not saved: our runs and the paper's, in two colours."""
    import wandb_workspaces.reports.v2 as wr

    where: Any = dict(entity=entity, project=project)
    blocks: list[Any] = [wr.TableOfContents()]
    for name, panels in all_panels().items():
        runs = [wr.Runset(**where, name="runs", filters="JobType != 'paper'")]
        if name == ACCURACY:
            runs.append(wr.Runset(**where, name="paper", filters="JobType = 'paper'"))
        blocks += [wr.H1(name), wr.PanelGrid(runsets=runs, panels=panels)]
    return wr.Report(
        **where,
        title="EViT Lab",
        description="Accuracy and cost of every run, beside the rows of the paper.",
        blocks=blocks,
        width="fluid",
    )


def all_panels() -> dict[str, list[Any]]:
    """The panels of each section."""
    import wandb_workspaces.reports.v2 as wr

    def scatter(x: str, title: str) -> Any:
        metrics: Any = dict(x=wr.SummaryMetric(x), y=wr.SummaryMetric("top1"))
        return wr.ScatterPlot(title=title, layout=wr.Layout(w=12, h=9), **metrics)

    def line(metric: str) -> Any:
        return wr.LinePlot(title=metric, x="trainer/global_step", y=[metric])

    columns = [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key)) for key in KEYS]
    wide = wr.Layout(w=24, h=9)
    return {
        ACCURACY: [
            scatter("macs", "top-1 by multiply-accumulates of an image"),
            scatter("throughput", "top-1 by images/s"),
            wr.ParallelCoordinatesPlot(columns=columns, layout=wide),
        ],
        "Training": [
            line(name)
            for name in ("val/top1", "val/loss", "train/loss", "keep_rate", "tokens_per_image")
        ],
        "Patches that survive": [
            wr.MediaBrowser(media_keys=["kept_patches"], gallery_axis="step", layout=wide)
        ],
    }
