"""A sweep on this machine: as many runs at once as there are slots, each a process of its own."""

import fcntl
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evit.config import listed
from evit.report.results import write_json
from evit.sweeps.jobs import Job

# What torchrun, SLURM and MPI tell the processes that they start: a run is to start its own.
LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "GROUP_", "ROLE_")
RANKS = "RANK LOCAL_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
LOG = "run.log"
FAILED = "failed.json"  # in the folder of a job that failed: why, for the report
GRACE = 60  # seconds to end by itself, after SIGTERM


@dataclass
class Process:
    """A job that runs."""

    job: Job
    slot: dict[str, str]  # environment of its own
    popen: subprocess.Popen
    tries: int
    started: float
    offset: int  # in the log


def make_slots(slots: Any) -> list[dict[str, str]]:
    """The environment of each slot, from a number of them or from a list of their GPUs.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(slots, list) and slots:
        return [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, listed(gpus)))} for gpus in slots]
    if not isinstance(slots, int) or slots < 1:
        raise ValueError(
            f"slots must be a number, or GPUs as in [0,1] or [[0,1],[2,3]], got {slots!r}"
        )
    if slots == 1:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.device_count():
        threads = max(1, (os.cpu_count() or 1) // slots)
        return [{"OMP_NUM_THREADS": str(threads)}] * slots
    shares = [gpus[i::slots] or [gpus[i % len(gpus)]] for i in range(slots)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def environment(slot: dict[str, str]) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in RANKS and not k.startswith(LAUNCHERS)}
    return own | {"PYTHONUNBUFFERED": "1"} | slot


def start(job: Job, slot: dict[str, str], tries: int = 0) -> Process | None:
    """Start a job; None where it runs already.

    Its output goes to the log in its folder. The log is locked for as long as a process of the run
    is alive, even if the sweep has ended before it.
    """
    command = job.command
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / LOG).open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        (job.folder / FAILED).unlink(missing_ok=True)
        offset = log.seek(0, os.SEEK_END)
        popen = subprocess.Popen(
            command,
            env=environment(slot),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Process(job, slot, popen, tries, time.monotonic(), offset)


def stop(popens: list[subprocess.Popen]) -> None:
    """End processes and all that they have started; a run goes on from its last checkpoint."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10)):
        for popen in popens:
            try:
                os.killpg(popen.pid, number)
            except ProcessLookupError:
                pass
        until = time.monotonic() + seconds
        while any(popen.poll() is None for popen in popens) and time.monotonic() < until:
            time.sleep(0.1)


def last_lines(path: Path, offset: int = 0) -> list[str]:
    """The last lines of a log, from an offset on, that are not empty."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(offset, path.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def why(process: Process) -> str:
    """How a process has ended, in words, with the last error or line in its log."""
    status, lines = process.popen.returncode, last_lines(process.job.folder / LOG, process.offset)
    number = -status if status < 0 else status - 128  # a shell's
    names = {int(known): known.name for known in signal.Signals}
    ended = f"exit status {status}"
    if number in names:
        ended = f"killed by signal {number} ({names[number]})"
    if number == signal.SIGKILL:
        return f"{ended}: out of memory?"
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    return ": ".join([ended, *(errors or lines)[-1:]])


def note_failure(job: Job, reason: str) -> None:
    """Leave the reason in the folder of a job, until it is begun again."""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(dict(job=job.name, reason=reason), job.folder / FAILED)


def forget_failures(folder: Path) -> None:
    """Remove from a sweep's folder the notes of jobs that have left nothing else."""
    for path in folder.glob(f"*/{FAILED}"):
        if len(list(path.parent.iterdir())) == 1:
            path.unlink()
            path.parent.rmdir()


def run_all(
    jobs: list[Job],
    slots: Any,
    retries: int,
    timeout: float | None,
    tell: Callable[[Job, str, str], None],
) -> list[tuple[Job, str]]:
    """Run jobs, and return those that failed, with the reason.

    Args:
        jobs: in the order in which they are started; one that starts from another of them waits.
        slots: see make_slots.
        retries: how often a job that fails is tried again.
        timeout: hours for one try.
        tell: called with a job, its new state and more about it; and with "" for the state while
            it runs.

    A signal, which ends the program, stops them.
    """
    free, waiting = make_slots(slots), list(jobs)
    running: list[Process] = []
    failed: list[tuple[Job, str]] = []

    def end(job: Job, state: str, text: str) -> None:
        if state == "failed":
            failed.append((job, text))
        tell(job, state, text)

    def fail(job: Job, reason: str) -> None:
        note_failure(job, reason)
        end(job, "failed", reason)

    try:
        while waiting or running:
            failures = {job.folder for job, _ in failed}
            unfinished = {job.folder for job in waiting} | {p.job.folder for p in running}
            for job in list(waiting):
                if job.source in failures:
                    waiting.remove(job)
                    fail(job, f"not begun: it starts from {job.source}, which failed")
                elif job.source and job.source not in unfinished and job.state() == "finished":
                    waiting.remove(job)
                    end(job, "finished", f"with the same result of {job.source}")
                elif free and job.source not in unfinished:
                    waiting.remove(job)
                    slot = free.pop(0)
                    if process := start(job, slot):
                        running.append(process)
                        tell(job, "running", str(job.folder / LOG))
                    else:
                        free.append(slot)
                        end(job, "failed", f"it runs already, see {job.folder / LOG}")
            for process in list(running):
                job, seconds = process.job, time.monotonic() - process.started
                if timeout and seconds > timeout * 3600 and process.popen.poll() is None:
                    stop([process.popen])
                    reason = f"stopped after {timeout:g} h"
                elif process.popen.poll() is None:
                    tell(job, "", "".join(last_lines(job.folder / LOG)[-1:]))
                    continue
                else:
                    reason = why(process)
                running.remove(process)
                stop([process.popen])  # what it may have left behind
                if process.popen.returncode == 0 and job.state() == "finished":
                    end(job, "finished", f"{seconds / 60:.1f} min")
                elif process.tries < retries and (
                    again := start(job, process.slot, process.tries + 1)
                ):
                    running.append(again)
                    tell(job, "running", f"again, after {reason}")
                    continue
                else:
                    fail(job, reason)
                free.append(process.slot)
            time.sleep(0.2)
    finally:
        stop([process.popen for process in running])
    return failed
