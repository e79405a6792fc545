"""What src/sweep.py does."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evit.commands.cli import check_spelling
from evit.config import CONF_DIR, listed, overridden
from evit.sweeps import local, overview
from evit.sweeps.jobs import CONFIGS, Job, check_needs, make_jobs, names, read

KNOBS = CONF_DIR / "sweep.yaml"


@dataclass
class SweepConfig:
    """The knobs of src/sweep.py."""

    job: Any = None  # a number, or a list
    slots: Any = MISSING  # a number, or a list of GPUs
    retries: int = MISSING
    timeout: float | None = None
    dry_run: bool = MISSING
    wandb: str | None = None
    launcher: str = MISSING
    slurm: dict[str, Any] = MISSING


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
    check_spelling(more, CONFIGS[sweep.program])
    jobs = make_jobs(name, sweep, more)
    if cfg.wandb:
        Path(cfg.wandb).write_text(yaml.safe_dump(wandb_sweep(name, more, jobs), sort_keys=False))
        print(f"wandb sweep {cfg.wandb}")
        return 0
    if cfg.job is not None:
        if not set(listed(cfg.job)) <= {job.number for job in jobs}:
            raise ValueError(f"job must be from 0 to {len(jobs) - 1}, got {cfg.job}")
        jobs = [job for job in jobs if job.number in listed(cfg.job)]
    broken = [(job, f"it does not compose: {job.error}") for job in jobs if job.error]
    if cfg.dry_run:
        overview.show(name, jobs, overview.costs(jobs, sweep.needs))
        return tell_failed(broken)
    check_needs(name, sweep, jobs)
    status = tell_failed(broken)
    todo = [job for job in jobs if job.state() not in ("finished", "broken")]
    if cfg.launcher == "slurm":
        return on_slurm(name, todo, cfg) or status
    return here(name, jobs, todo, broken, cfg)


def split(arguments: list[str]) -> tuple[SweepConfig, list[str]]:
    """The sweep's own knobs, and the overrides of all of its runs.

    Raises:
        ValueError: a knob has no such value.
    """
    arguments = ["dry_run=true" if a == "--dry-run" else a for a in arguments]
    known = {entry.name for entry in fields(SweepConfig)}
    own = [a for a in arguments if {name.split(".")[0] for name in overridden([a])} <= known]
    try:
        values = [OmegaConf.load(KNOBS), OmegaConf.from_dotlist(own)]
        cfg: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepConfig), *values))
    except OmegaConfBaseException as error:
        raise ValueError(f"{' '.join(own)}: {str(error).splitlines()[0]}") from error
    if cfg.launcher not in ("local", "slurm"):
        raise ValueError(f"launcher must be local or slurm, got {cfg.launcher!r}")
    return cfg, [a for a in arguments if a not in own]


def here(
    name: str, jobs: list[Job], todo: list[Job], broken: list[tuple[Job, str]], cfg: SweepConfig
) -> int:
    """Run jobs on this machine, and after them those that start from them."""
    folders = {job.folder for job in todo}
    todo = [job for job in jobs if job in todo or job.source in folders]
    before = len(jobs) - len(todo) - len(broken)
    print(f"{len(jobs)} runs, of which {before} have finished before", flush=True)
    local.forget_failures(Path("outputs", name))
    for job, reason in broken:
        local.note_failure(job, reason)
    failed: list[tuple[Job, str]] = []
    if todo:
        with overview.Progress(todo) as tell:
            failed = local.run_all(todo, cfg.slots, cfg.retries, cfg.timeout, tell)
    overview.show(name, jobs)
    return tell_failed(broken + failed)


def tell_failed(failed: list[tuple[Job, str]]) -> int:
    """Name the jobs that failed, and why; return the exit status."""
    for job, reason in failed:
        print(f"failed: job {job.number}, {job.name}: {reason}", file=sys.stderr)
        if (log := job.folder / local.LOG).is_file():
            print(f"  {log}", file=sys.stderr)
    return 1 if failed else 0


def on_slurm(name: str, todo: list[Job], cfg: SweepConfig) -> int:
    """Submit jobs."""
    try:
        from evit.sweeps import slurm
    except ImportError as error:
        raise ValueError(f"launcher=slurm needs submitit: {error}") from error
    sent = slurm.submit(name, todo, cfg.slurm)
    for job in sent:
        print(f"job {job.number} submitted as {slurm.job_id(job.folder)}: {job.name}")
    print(f"{len(sent)} runs submitted, {len(todo) - len(sent)} in the queue before")
    return 0


def wandb_sweep(name: str, more: list[str], jobs: list[Job]) -> dict[str, Any]:
    """The sweep for `wandb sweep`: its agents take the jobs by number."""
    command = ["${env}", sys.executable, "${program}", name, "${args_no_hyphens}", *more]
    parameters = dict(job=dict(values=[job.number for job in jobs]))
    return dict(
        name=name, program="src/sweep.py", command=command, method="grid", parameters=parameters
    )
