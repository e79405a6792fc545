"""src/sweep.py: the runs of a file of sweeps/, each a process, and only those not finished."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evit.commands import processes
from evit.commands.cli import check_spelling
from evit.commands.jobs import NOT_COMPOSED, PROGRAMS, Job, check_needs, make_jobs, names, read
from evit.config import CONF_DIR, listed, overridden
from evit.report import results

KNOBS = CONF_DIR / "sweep.yaml"


def run(arguments: list[str]) -> int:
    """Run the sweep that the command line asks for; return the exit status.

    Raises:
        ValueError: the command line cannot be served; nothing has begun.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(KNOBS.read_text() + f"\nSweeps: {', '.join(names())}")
        return 0
    name, *rest = arguments
    cfg, more = split(rest)
    sweep = read(name)
    check_spelling(more, PROGRAMS[sweep.program][0])
    jobs = make_jobs(name, sweep, more)
    if cfg.wandb:
        Path(cfg.wandb).write_text(yaml.safe_dump(wandb_sweep(name, more, jobs), sort_keys=False))
        print(f"wandb sweep {cfg.wandb}")
        return 0
    if cfg.job is not None:
        if not set(listed(cfg.job)) <= {job.number for job in jobs}:
            raise ValueError(f"job must be from 0 to {len(jobs) - 1}, got {cfg.job}")
        jobs = [job for job in jobs if job.number in listed(cfg.job)]
    costs = [hours(job, sweep.needs) for job in jobs] if cfg.dry_run else None
    broken = [(job, f"it does not compose: {job.error}") for job in jobs if job.error]
    if cfg.dry_run:
        show(name, jobs, costs)
        return tell_failed(broken)
    check_needs(name, sweep, jobs)
    status = tell_failed(broken)
    todo = [job for job in jobs if not job.error and job.state() != "finished"]
    if cfg.launcher == "slurm":
        return on_slurm(name, todo, cfg.slurm) or status
    folders = {job.folder for job in todo}  # a job whose source runs may have to run after it
    todo = [job for job in jobs if job in todo or job.source in folders]
    before = len(jobs) - len(todo) - len(broken)
    print(f"{len(jobs)} runs, of which {before} have finished before", flush=True)
    processes.forget_failures(Path("outputs", name))
    for job, reason in broken:
        processes.note_failure(job, reason)
    try:
        failed = processes.run_all(todo, cfg.slots)
    except BaseException as error:
        if not isinstance(error, Exception):  # a signal, or Ctrl-C
            print("Stopped: the same command goes on.", flush=True)
        raise
    show(name, jobs)
    return tell_failed(broken + failed)


def split(arguments: list[str]) -> tuple[SimpleNamespace, list[str]]:
    """Split a command line into the sweep's own knobs, and the overrides of all of its runs.

    Raises:
        ValueError: a knob has no such value.
    """
    arguments = ["dry_run=true" if a == "--dry-run" else a for a in arguments]
    knobs = OmegaConf.load(KNOBS)
    own = [a for a in arguments if {name.split(".")[0] for name in overridden([a])} <= set(knobs)]
    try:
        merged: Any = OmegaConf.to_container(OmegaConf.merge(knobs, OmegaConf.from_dotlist(own)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{' '.join(own)}: {str(error).splitlines()[0]}") from error
    cfg = SimpleNamespace(**merged)
    if cfg.launcher not in ("local", "slurm"):
        raise ValueError(f"launcher must be local or slurm, got {cfg.launcher!r}")
    return cfg, [a for a in arguments if a not in own]


def tell_failed(failed: list[tuple[Job, str]]) -> int:
    """Name the jobs that failed, and why; return the exit status."""
    for job, reason in failed:
        print(f"failed: job {job.number}, {job.name}: {reason}", file=sys.stderr)
        if (log := job.folder / processes.LOG).is_file():
            print(f"  {log}", file=sys.stderr)
    return 1 if failed else 0


def on_slurm(name: str, todo: list[Job], options: dict[str, Any]) -> int:
    try:
        from evit.commands import slurm
    except ImportError as error:
        raise ValueError(f"launcher=slurm needs submitit: {error}") from error
    sent = slurm.submit(name, todo, options)
    for job in sent:
        print(f"job {job.number} submitted as {slurm.job_id(job.folder)}: {job.name}")
    print(f"{len(sent)} runs submitted, {len(todo) - len(sent)} in the queue before")
    return 0


def wandb_sweep(name: str, more: list[str], jobs: list[Job]) -> dict[str, Any]:
    """The file for `wandb sweep`, whose agents take the jobs by number."""
    command = ["${env}", sys.executable, "${program}", name, "${args_no_hyphens}", *more]
    parameters = dict(job=dict(values=[job.number for job in jobs]))
    return dict(
        name=name, program="src/sweep.py", command=command, method="grid", parameters=parameters
    )


def hours(job: Job, needs: list[str]) -> tuple[float | None, float | None]:
    """The GPU hours of a run and the paper's top-1: from its own images/s, else as planned.

    Args:
        needs: knobs that are taken as given.
    """
    from evit.commands.plan import GPUS, plan

    if job.program != "train" or job.error:
        return None, None
    cfg = job.cfg.copy()
    for knob in set(needs) - {"data.root"}:  # the plan is of ImageNet
        OmegaConf.update(cfg, knob, OmegaConf.select(cfg, knob) or "PATH")
    try:
        planned = plan(cfg)
    except NOT_COMPOSED as error:  # as that of a model that Hydra calls in vain
        job.error = " ".join(f"{error} {error.__cause__ or ''}".split())
        return None, None
    amount = planned["hours"] and planned["hours"] * GPUS
    result = results.finished(job.folder) if job.state() == "finished" else None
    if result and (speed := result["train_images_per_s"]):
        images = planned["epochs"] * planned["steps_per_epoch"] * planned["batch_size"]
        amount = images / speed / 3600 * result["processes"]
    return amount, planned["paper"][0]["top1"] if planned["paper"] else None


def show(name: str, jobs: list[Job], costs: list[Any] | None = None) -> None:
    """Print the jobs of a sweep, their states and results; and their hours, if given."""
    states = ["broken" if job.error else job.state() for job in jobs]
    title = f"sweep {name}: {len(jobs)} runs, {states.count('finished')} finished"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_edge=False)
    table.add_column("job", justify="right")
    table.add_column(f"python src/{jobs[0].program}.py", overflow="fold")
    table.add_column("state")
    for column in ("top-1", "paper", "GPU hours") if costs else ("top-1",):
        table.add_column(column, justify="right")
    for i, (job, state) in enumerate(zip(jobs, states, strict=True)):
        result = results.finished(job.folder) if state == "finished" else None
        if state == "missing" and (job.folder / processes.FAILED).is_file():
            state = "failed"
        cells = [
            str(job.number),
            escape(job.name),
            state,
            f"{result['top1']:.2f}" if result else "",
        ]
        if costs:
            amount, paper = costs[i]
            cells += [f"{paper or ''}", hours_text(amount)]
        table.add_row(*cells)
    console = Console()
    console.print(table, highlight=False)
    amounts = [cost[0] or 0 for cost in costs or []]
    if any(amounts):
        left = sum(a for a, state in zip(amounts, states, strict=True) if state != "finished")
        text = f"{hours_text(sum(amounts))} GPU hours, {hours_text(left)} of them to come: of "
        text += "finished runs from their images/s, of others estimated (docs/recipes.md, Hours)"
        console.print(text, highlight=False, soft_wrap=True)


def hours_text(amount: float | None) -> str:
    return "-" if not amount else f"{amount:.0f}" if amount >= 10 else f"{amount:.2g}"
