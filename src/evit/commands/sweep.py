"""src/sweep.py: the runs of a file of sweeps/, each a process, and only those not finished."""

import sys
from types import SimpleNamespace
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evit.commands import processes
from evit.commands.cli import check_spelling
from evit.commands.jobs import NOT_COMPOSED, PROGRAMS, Job, make_jobs, names, read
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
    if cfg.job is not None:
        if not set(listed(cfg.job)) <= {job.number for job in jobs}:
            raise ValueError(f"job must be from 0 to {len(jobs) - 1}, got {cfg.job}")
        jobs = [job for job in jobs if job.number in listed(cfg.job)]
    costs = [hours(job, sweep.needs) for job in jobs] if cfg.dry_run else None
    broken = [(job, f"it does not compose: {job.error}") for job in jobs if job.error]
    if costs:
        show(name, jobs, costs)
        return tell_failed(broken)
    for knob in sweep.needs:
        if any(OmegaConf.select(job.cfg, knob) is None for job in jobs if not job.error):
            hint = ", or IMAGENET_DIR=DIR in the environment" if knob == "data.root" else ""
            raise ValueError(f"sweeps/{name}.yaml needs {knob}=PATH{hint}")
    todo = [job for job in jobs if not job.error and job.state() != "finished"]
    if cfg.launcher == "slurm":
        from evit.commands import slurm

        slurm.submit(name, todo, cfg.slurm)
        return tell_failed(broken)
    folders = {job.folder for job in todo}  # a job whose source runs may have to run after it
    todo = [job for job in jobs if job in todo or job.source in folders]
    before = len(jobs) - len(todo) - len(broken)
    print(f"{len(jobs)} runs, of which {before} have finished before", flush=True)
    tell_failed(broken)
    failed = processes.run_all(todo, cfg.slots)
    show(name, jobs)
    return tell_failed(broken + failed)


def split(arguments: list[str]) -> tuple[SimpleNamespace, list[str]]:
    """Split a command line into the sweep's own knobs, and the overrides of all of its runs."""
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
    return 1 if failed else 0


def hours(job: Job, needs: list[str]) -> tuple[float, Any]:
    """The estimated GPU hours of a run, 0 if not known, and the paper's top-1; needs are given."""
    from evit.commands.plan import GPUS, plan

    if job.program != "train" or job.error:
        return 0, ""
    cfg = job.cfg.copy()
    for knob in set(needs) - {"data.root"}:  # without a root, ImageNet is meant
        OmegaConf.update(cfg, knob, OmegaConf.select(cfg, knob) or "PATH")
    try:
        found = plan(cfg)
    except NOT_COMPOSED as error:  # as that of a model that Hydra calls in vain
        job.error = " ".join(f"{error} {error.__cause__ or ''}".split())
        return 0, ""
    return (found["hours"] or 0) * GPUS, found["paper"][0]["top1"] if found["paper"] else ""


def show(name: str, jobs: list[Job], costs: list[tuple[float, Any]] | None = None) -> None:
    """Print the jobs of a sweep, their states and results; and their hours, if given."""
    heads = ["job", f"python src/{jobs[0].program}.py", "state", "top-1"]
    table = Table(*heads, *["paper", "GPU hours"] * bool(costs), box=None)
    states = ["broken" if job.error else job.state() for job in jobs]
    for i, (job, state) in enumerate(zip(jobs, states, strict=True)):
        if state == "missing" and (job.folder / processes.FAILED).is_file():
            state = "failed"
        result = results.finished(job.folder) if state == "finished" else None
        top1 = f"{result['top1']:.2f}" if result else ""
        cost = (
            [str(costs[i][1]), f"{costs[i][0]:.{0 if costs[i][0] >= 10 else 1}f}"] if costs else []
        )
        table.add_row(str(job.number), escape(job.name), state, top1, *cost)
    print(f"sweep {name}: {len(jobs)} runs, {states.count('finished')} finished")
    Console().print(table, highlight=False)
    if costs and (total := sum(amount for amount, _ in costs)):
        print(f"{total:.0f} GPU hours in all, as estimated (docs/recipes.md, Hours)")
