"""What a sweep consists of, costs and has found, for people."""

from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from evit.sweeps.jobs import Job
from evit.sweeps.local import FAILED

COLORS = dict(finished="green", failed="red", broken="red", running="cyan", changed="yellow")


def costs(jobs: list[Job], needs: list[str]) -> list[dict[str, Any]]:
    """Of each job: hours of one GPU (or of what it ran on), and the paper's top1; None: unknown.

    Hours are those of the images/s that the run had; before that the estimate of src/train.py
    --dry-run, from the paper's images/s, or else the mean of the runs that have finished.

    Args:
        jobs: of a sweep.
        needs: knobs that are taken as given.
    """
    from evit.commands.plan import GPUS, plan

    found: list[dict[str, Any]] = []
    for job in jobs:
        if job.program != "train" or job.error:
            found.append(dict(hours=None, paper=None))
            continue
        cfg = job.cfg.copy()
        for knob in needs:
            OmegaConf.update(cfg, knob, OmegaConf.select(cfg, knob) or "PATH")
        planned, result = plan(cfg), job.result()
        hours = planned["hours"] and planned["hours"] * GPUS
        if result and (speed := result["train_images_per_s"]):
            images = planned["epochs"] * planned["steps_per_epoch"] * planned["batch_size"]
            hours = images / speed / 3600 * result["processes"]
        rows = planned["paper"]
        found.append(dict(hours=hours, paper=rows[0]["top1"] if rows else None))
    measured = [row["hours"] for row in found if row["hours"]]
    if measured and all(row["paper"] is None for row in found):
        mean = sum(measured) / len(measured)
        found = [row | dict(hours=row["hours"] or mean) for row in found]
    return found


def show(name: str, jobs: list[Job], costs: list[dict[str, Any]] | None = None) -> None:
    """Print the jobs of a sweep, their states and results; and their costs, if given."""
    console = Console()
    states = [job.state() for job in jobs]
    title = f"sweep {name}: {len(jobs)} runs, {states.count('finished')} finished"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_edge=False)
    table.add_column("job", justify="right")
    table.add_column(f"python src/{jobs[0].program}.py", overflow="fold")
    table.add_column("state")
    for column in ("top-1", "paper", "GPU hours") if costs else ("top-1",):
        table.add_column(column, justify="right")
    for i, job in enumerate(jobs):
        result = job.result() if job.program == "train" else None
        failed = states[i] in ("missing", "unfinished") and (job.folder / FAILED).is_file()
        state = "failed" if failed else states[i]
        cells = [str(job.number), escape(job.name), colored(state)]
        cells.append(f"{result['top1']:.2f}" if result else "")
        if costs:
            cells += [f"{costs[i]['paper'] or ''}", amount(costs[i]["hours"])]
        table.add_row(*cells)
    console.print(table, highlight=False)
    if costs and any(row["hours"] for row in costs):
        hours = [row["hours"] or 0 for row in costs]
        left = [h for h, state in zip(hours, states, strict=True) if state != "finished"]
        console.print(
            f"{amount(sum(hours))} GPU hours, {amount(sum(left))} of them to come: of finished "
            f"runs from their images/s, of others estimated (docs/recipes.md, Hours)",
            highlight=False,
            soft_wrap=True,
        )


def amount(hours: float | None) -> str:
    return "-" if not hours else f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"


def colored(state: str) -> str:
    return f"[{COLORS[state]}]{state}[/]" if state in COLORS else state


class Progress:
    """Tells of the jobs as they run: a table on a terminal, lines elsewhere."""

    def __init__(self, jobs: list[Job]):
        self.console = Console()
        self.jobs = jobs
        self.states = {job.number: ("waiting", "") for job in jobs}
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(get_renderable=self.table, console=self.console, refresh_per_second=2)

    def __enter__(self) -> Callable[[Job, str, str], None]:
        if self.live:
            self.live.start()
        return self.tell

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def tell(self, job: Job, state: str, text: str) -> None:
        known, _ = self.states[job.number]
        self.states[job.number] = (state or known, text)
        if state and not self.live:
            print(f"job {job.number} {state}: {job.name} ({text})", flush=True)

    def table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for name in ("job", "run", "state", ""):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for job in self.jobs:
            state, text = self.states[job.number]
            table.add_row(str(job.number), escape(job.name), colored(state), escape(text))
        return table
