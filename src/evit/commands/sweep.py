"""src/sweep.py: run the jobs of a sweep that have not finished, here or through SLURM."""

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf

from evit.commands.jobs import FAILED, KNOBS, Job, estimate, make_jobs, names, read, show, split
from evit.config import CONF_DIR, OUTPUTS, counted, listed
from evit.report import results

LOG, JOB_ID = "run.log", "slurm_job"  # in the folder of a run: its output, and its id in SLURM
GRACE = 60  # seconds for a run to end after SIGTERM
# What torchrun, SLURM and MPI tell the processes that they start: a run is to start its own.
LAUNCHERS = re.compile(
    "(LOCAL_|NODE_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$|(SLURM|TORCHELASTIC|PMIX?|OMPI|GROUP|ROLE)_"
)


def run(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(KNOBS.read_text() + f"\nSweeps: {', '.join(names())}")
        return 0
    name, sweep = arguments[0], read(arguments[0])
    cfg, more = split(arguments[1:])
    jobs = make_jobs(name, sweep, more)
    wanted = range(len(jobs)) if cfg["job"] is None else listed(cfg["job"])
    if not {*wanted} <= {job.number for job in jobs}:
        raise ValueError(f"job must be from 0 to {len(jobs) - 1}, got {cfg['job']}")
    jobs = [job for job in jobs if job.number in wanted]
    sound = [job for job in jobs if not job.error]
    for job in sound if cfg["dry_run"] and sweep.program == "train" else []:
        estimate(job, sweep.needs)
    failed = [(job, f"it does not compose: {job.error}") for job in jobs if job.error]
    tell_failed(failed)
    if cfg["dry_run"]:
        show(name, jobs, estimated=True)
        return bool(failed)
    for knob in sweep.needs:
        if any(OmegaConf.select(job.cfg, knob) is None for job in sound):
            hint = ", or IMAGENET_DIR=DIR in the environment" if knob == "data.root" else ""
            raise ValueError(f"sweeps/{name}.yaml needs {knob}=PATH{hint}")
    todo = [job for job in sound if job.state() != "finished"]
    if cfg["launcher"] == "slurm":
        submit(name, todo, cfg["slurm"])
        return bool(failed)
    print(f"{counted(len(jobs), 'run')}, of which {len(sound) - len(todo)} have finished before")
    failed += run_all(sound, cfg["slots"])
    show(name, jobs)
    tell_failed(failed)
    return bool(failed)


def tell_failed(failed: list[tuple[Job, str]]) -> None:
    for job, reason in failed:
        print(f"failed: job {job.number}, {job.name}: {reason}", file=sys.stderr)


def make_slots(slots: Any) -> list[dict[str, str]]:
    """The environment of each slot: the GPUs of a list, or its share of all, or of the cores."""
    if slots == 1:
        return [{}]
    if isinstance(slots, int) and slots > 1:
        if not (count := torch.cuda.device_count()):
            return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // slots))}] * slots
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        slots = [gpus[i::slots] or [gpus[i % len(gpus)]] for i in range(slots)]
    if not isinstance(slots, list) or not slots:
        raise ValueError(f"slots must be a number, or GPUs as in [[0,1],[2,3]], got {slots!r}")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, listed(gpus)))} for gpus in slots]


def run_all(jobs: list[Job], slots: Any) -> list[tuple[Job, str]]:
    """Run jobs, each after the one that it starts from; return those that failed, and why."""
    environments, waiting, running = make_slots(slots), list(jobs), dict[int, Job]()
    failed: dict[Any, tuple[Job, str]] = {}

    def tell(job: Job, what: str, reason: str = "") -> None:
        if what == "failed":
            failed[job.folder] = job, reason
        print(f"job {job.number} {what}: {job.name}" + f" ({reason})" * bool(reason), flush=True)

    try:
        while running or waiting:
            for slot, environment in enumerate(environments):
                if slot in running and running[slot].popen.poll() is not None:
                    job = running.pop(slot)
                    stop([job.popen])  # end processes that it left behind
                    if job.popen.returncode == 0 and job.state() == "finished":
                        tell(job, "finished")
                    else:
                        tell(job, "failed", reason := why(job))
                        results.write_json(dict(job=job.name, reason=reason), job.folder / FAILED)
                unfinished = {job.folder for job in (*waiting, *running.values())}
                ready = [job for job in waiting if job.source not in unfinished]
                if slot in running or not ready:
                    continue
                waiting.remove(job := ready[0])
                if job.source in failed:
                    tell(job, "failed", f"not begun: it starts from {job.source}, which failed")
                elif job.state() != "finished":
                    try:
                        start(job, environment)
                        running[slot] = job
                        tell(job, "running", str(job.folder / LOG))
                    except BlockingIOError:
                        tell(job, "failed", f"it runs already, see {job.folder / LOG}")
            time.sleep(0.1 if running else 0)
    finally:
        stop([job.popen for job in running.values()])
    return list(failed.values())


def start(job: Job, environment: dict[str, str]) -> None:
    """Start a job; a BlockingIOError if it runs already, even if its sweep has ended before it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / LOG).open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until all processes of the run have ended
        (job.folder / FAILED).unlink(missing_ok=True)
        job.log_offset = log.tell()  # which moves on as soon as the job writes
        own = {name: value for name, value in os.environ.items() if not LAUNCHERS.match(name)}
        where: Any = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        where |= dict(env=own | {"PYTHONUNBUFFERED": "1"} | environment, start_new_session=True)
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


def stop(popens: list[subprocess.Popen]) -> None:
    """End processes and their children; a run can continue from its last checkpoint."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10)):
        for popen in popens:
            with suppress(ProcessLookupError):
                os.killpg(popen.pid, number)
        until = time.monotonic() + seconds
        while any(popen.poll() is None for popen in popens) and time.monotonic() < until:
            time.sleep(0.05)


@dataclass
class Task:  # the work of one SLURM task, which is one of the run's processes
    command: list[str]
    popen: Any = None

    def __call__(self) -> None:
        """Run the command; after a requeue, continue the run."""
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            self.command = [part for part in self.command if part != "overwrite=true"]
        print(" ".join(self.command), flush=True)
        # In a session of its own, or the signal that asks for a checkpoint would end it.
        self.popen = subprocess.Popen(self.command, start_new_session=True)
        if (status := self.popen.wait()) == 128 + signal.SIGTERM:
            time.sleep(GRACE)  # SLURM preempts this job, and is about to end it
        if status:
            raise RuntimeError(f"exit status {status}: {' '.join(self.command)}")

    def checkpoint(self) -> Any:
        """Stop before the end of time or preemption; submitit requeues the job."""
        import submitit

        stop([self.popen] if self.popen else [])
        return submitit.helpers.DelayedSubmission(Task(self.command))


def submit(name: str, jobs: list[Job], options: dict[str, Any]) -> None:
    """Submit the jobs that are not in the queue, as an array, with submitit's options for each."""
    import submitit

    def job_id(folder: Any) -> str:  # under which its run was last submitted
        known = folder and (folder / JOB_ID).is_file()
        return (folder / JOB_ID).read_text().strip() if known else ""

    queue = "squeue --me --noheader --array --format=%i".split()
    setup = f'export PYTHONPATH={shlex.quote(str(CONF_DIR.parent / "src"))}:"$PYTHONPATH"'
    given = {key: value for key, value in options.items() if value is not None}
    extra = dict(requeue=True) | given.pop("slurm_additional_parameters", {})
    logs, failed = OUTPUTS / "slurm" / name / "%j", submitit.core.utils.FailedJobError
    try:
        there = subprocess.check_output(queue, text=True).split()
        todo = [job for job in jobs if job_id(job.folder) not in there]
        folders = {job.folder for job in todo}
        later = [job for job in todo if job.source in folders or job_id(job.source) in there]
        executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=1000)
        executor.update_parameters(**dict(name=name, slurm_setup=[setup]) | given)
        first = [job for job in todo if job not in later]
        for group in filter(None, [first, *([job] for job in later)]):
            after = {} if group is first else dict(dependency=f"afterok:{job_id(group[0].source)}")
            executor.update_parameters(slurm_additional_parameters=extra | after)
            with executor.batch():  # one job array
                array = [executor.submit(Task(job.command)) for job in group]
            for job, sent in zip(group, array, strict=True):
                job.folder.mkdir(parents=True, exist_ok=True)
                (job.folder / JOB_ID).write_text(f"{sent.job_id}\n")
                print(f"job {job.number} submitted as {sent.job_id}: {job.name}")
    except (OSError, subprocess.CalledProcessError, failed, NameError, TypeError) as error:
        raise ValueError(f"launcher=slurm: {error}") from error
    print(f"{counted(len(todo), 'run')} submitted, {len(jobs) - len(todo)} in the queue before")
