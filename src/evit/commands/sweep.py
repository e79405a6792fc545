"""src/sweep.py: the runs of a file of sweeps/, each a process, and only those not finished."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evit.commands import check_spelling
from evit.commands.jobs import (
    FAILED,
    PROGRAMS,
    Job,
    make_jobs,
    names,
    one_line,
    read,
    stop,
    submit,
)
from evit.config import CONF_DIR, counted, listed, overridden
from evit.report import results

KNOBS = CONF_DIR / "sweep.yaml"
# What torchrun, SLURM and MPI tell the processes that they start: a run is to start its own.
LAUNCHERS = re.compile(
    "(LOCAL_|NODE_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$|(SLURM|TORCHELASTIC|PMIX?|OMPI|GROUP|ROLE)_"
)
LOG = "run.log"  # in the folder of a run


def run(arguments: list[str]) -> int:
    """Run the sweep that the command line asks for; return the exit status."""
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
    for job in jobs if cfg.dry_run and sweep.program == "train" else []:
        if not job.error:
            estimate(job, sweep.needs)
    failed = [(job, f"it does not compose: {job.error}") for job in jobs if job.error]
    tell_failed(failed)
    if cfg.dry_run:
        show(name, jobs, estimated=True)
        return bool(failed)
    for knob in sweep.needs:
        if any(OmegaConf.select(job.cfg, knob) is None for job in jobs if not job.error):
            hint = ", or IMAGENET_DIR=DIR in the environment" if knob == "data.root" else ""
            raise ValueError(f"sweeps/{name}.yaml needs {knob}=PATH{hint}")
    todo = [job for job in jobs if job.state() not in ("finished", "broken")]
    if cfg.launcher == "slurm":
        submit(name, todo, cfg.slurm)
        return bool(failed)
    folders = {job.folder for job in todo}  # a job whose source runs may have to run after it
    todo = [job for job in jobs if job.folder in folders or job.source in folders]
    before = len(jobs) - len(todo) - len(failed)
    print(f"{counted(len(jobs), 'run')}, of which {before} have finished before", flush=True)
    failed += run_all(todo, cfg.slots)
    show(name, jobs)
    tell_failed(failed)
    return bool(failed)


def split(arguments: list[str]) -> tuple[SimpleNamespace, list[str]]:
    """Split a command line into the sweep's own knobs, and the overrides of all of its runs."""
    arguments = ["dry_run=true" if a == "--dry-run" else a for a in arguments]
    knobs = OmegaConf.load(KNOBS)
    own = [a for a in arguments if {name.split(".")[0] for name in overridden([a])} <= set(knobs)]
    try:
        merged: Any = OmegaConf.to_container(OmegaConf.merge(knobs, OmegaConf.from_dotlist(own)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{' '.join(own)}: {str(error).splitlines()[0]}") from error
    if merged["launcher"] not in ("local", "slurm"):
        raise ValueError(f"launcher must be local or slurm, got {merged['launcher']!r}")
    return SimpleNamespace(**merged), [a for a in arguments if a not in own]


def tell_failed(failed: list[tuple[Job, str]]) -> None:
    for job, reason in failed:
        print(f"failed: job {job.number}, {job.name}: {reason}", file=sys.stderr)


def estimate(job: Job, needs: list[str]) -> None:
    """Note the GPU hours of a training run, and the paper's top-1, as if all needs were given."""
    from evit.commands.plan import GPUS, plan

    cfg = job.cfg.copy()
    for knob in set(needs) - {"data.root"}:  # without a root, ImageNet is meant
        OmegaConf.update(cfg, knob, OmegaConf.select(cfg, knob) or "PATH")
    try:
        found = plan(cfg)
    except Exception as error:  # of a model that Hydra calls in vain, say
        job.error = one_line(error)
    else:
        job.hours = (found["hours"] or 0) * GPUS
        job.paper = str(found["paper"][0]["top1"]) if found["paper"] else ""


def show(name: str, jobs: list[Job], estimated: bool = False) -> None:
    """Print the jobs of a sweep, their states and results; and their hours, if estimated."""
    heads = ["job", f"python src/{jobs[0].program}.py", "state", "top-1"]
    table, finished = Table(*heads, *["paper", "GPU hours"] * estimated, box=None), 0
    for job in jobs:
        state = job.state()
        finished += state == "finished"
        result = results.finished(job.folder) if state == "finished" else None
        top1 = f"{result['top1']:.2f}" if result else ""
        more = [job.paper, f"{job.hours:.0f}"] * estimated
        table.add_row(str(job.number), escape(job.name), state, top1, *more)
    print(f"sweep {name}: {counted(len(jobs), 'run')}, {finished} finished")
    Console().print(table, highlight=False)
    if total := sum(job.hours for job in jobs):
        print(f"{total:.0f} GPU hours in all, as estimated (docs/imagenet.md, Hours)")


def make_slots(slots: Any) -> list[dict[str, str]]:
    """Make the environment of each slot: the GPUs of a list, or its share of all, or of the cores.

    slots: how many, or the GPUs of each.
    """
    if isinstance(slots, list) and slots:
        return [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, listed(gpus)))} for gpus in slots]
    if not isinstance(slots, int) or slots < 1:
        text = f"a number, or GPUs as in [0,1] or [[0,1],[2,3]], got {slots!r}"
        raise ValueError(f"slots must be {text}")
    if slots == 1:
        return [{}]
    import torch

    if not (count := torch.cuda.device_count()):
        return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // slots))}] * slots
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    shares = [gpus[i::slots] or [gpus[i % len(gpus)]] for i in range(slots)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def start(job: Job, slot: dict[str, str]) -> None:
    """Start a job in a slot; a BlockingIOError if it runs already.

    The log in its folder is locked for as long as a process of the run is alive, even if the sweep
    has ended before it.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / LOG).open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (job.folder / FAILED).unlink(missing_ok=True)
        job.slot, job.log_offset = slot, log.tell()  # which moves on as soon as the job writes
        own = {name: value for name, value in os.environ.items() if not LAUNCHERS.match(name)}
        where: Any = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        where |= dict(env=own | {"PYTHONUNBUFFERED": "1"} | slot, start_new_session=True)
        job.popen = subprocess.Popen(job.command, **where)


def why(job: Job) -> str:
    """Say how a job has ended, with the last error or line in its log."""
    status = job.popen.returncode
    number, ended = -status if status < 0 else status - 128, f"exit status {status}"  # a shell's
    if number in set(signal.Signals):
        ended = f"killed by signal {number} ({signal.Signals(number).name})"
    if number == signal.SIGKILL:
        return f"{ended}: out of memory?"
    log = (job.folder / LOG).read_bytes()[job.log_offset :].decode(errors="replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    return ": ".join([ended, *(errors or lines)[-1:]])


def run_all(jobs: list[Job], slots: Any) -> list[tuple[Job, str]]:
    """Run jobs in this order, telling of each on a line; return those that failed, and why.

    A job that starts from another of them waits for it.
    """
    free, waiting, running = make_slots(slots), list(jobs), list[Job]()
    failed: dict[Any, tuple[Job, str]] = {}

    def tell(job: Job, what: str, reason: str = "") -> None:
        if what == "failed":
            failed[job.folder] = job, reason
        print(f"job {job.number} {what}: {job.name}" + f" ({reason})" * bool(reason), flush=True)

    try:
        while running or waiting:
            unfinished = {job.folder for job in waiting + running}
            for job in [job for job in waiting if job.source not in unfinished][: len(free)]:
                waiting.remove(job)
                if job.source in failed:
                    tell(job, "failed", f"not begun: it starts from {job.source}, which failed")
                elif job.state() == "finished":
                    tell(job, "finished", "its source has the same result as before")
                else:
                    try:
                        start(job, free[0])
                        running.append(job)
                        free.pop(0)
                        tell(job, "running", str(job.folder / LOG))
                    except BlockingIOError:
                        tell(job, "failed", f"it runs already, see {job.folder / LOG}")
            for job in [job for job in running if job.popen.poll() is not None]:
                running.remove(job)
                free.append(job.slot)
                stop([job.popen])  # end processes that it left behind
                if job.popen.returncode == 0 and job.state() == "finished":
                    tell(job, "finished")
                else:
                    tell(job, "failed", reason := why(job))
                    results.write_json(dict(job=job.name, reason=reason), job.folder / FAILED)
            time.sleep(0.1)
    finally:
        stop([job.popen for job in running])
    return list(failed.values())
