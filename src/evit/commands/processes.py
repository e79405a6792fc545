"""Jobs on this machine: as many at once as there are slots, each a process of its own."""

import fcntl
import os
import re
import signal
import subprocess
import time
from typing import Any, NamedTuple

from evit.commands.jobs import Job
from evit.config import listed
from evit.report.results import write_json

# What torchrun, SLURM and MPI tell the processes that they start: a run is to start its own.
RANKS = "RANK LOCAL_RANK NODE_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "GROUP_", "ROLE_")
LOG = "run.log"
FAILED = "failed.json"  # in the folder of a job that failed: why, for the report
GRACE = 60  # seconds for a run to end after SIGTERM


class Process(NamedTuple):
    """A job that runs."""

    job: Job
    slot: dict[str, str]  # environment of its own
    popen: subprocess.Popen
    offset: int  # in the log


def make_slots(slots: Any) -> list[dict[str, str]]:
    """Make the environment of each slot from a number of slots, or a list of their GPUs."""
    if isinstance(slots, list) and slots:
        return [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, listed(gpus)))} for gpus in slots]
    if not isinstance(slots, int) or slots < 1:
        raise ValueError(
            f"slots must be a number, or GPUs as in [0,1] or [[0,1],[2,3]], got {slots!r}"
        )
    if slots == 1:
        return [{}]
    import torch

    if not (count := torch.cuda.device_count()):
        return [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // slots))}] * slots
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    shares = [gpus[i::slots] or [gpus[i % len(gpus)]] for i in range(slots)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def environment(slot: dict[str, str]) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in RANKS and not k.startswith(LAUNCHERS)}
    return own | {"PYTHONUNBUFFERED": "1"} | slot


def start(job: Job, slot: dict[str, str]) -> Process | None:
    """Start a job; return None if it runs already.

    The log in its folder is locked for as long as a process of the run is alive, even if the sweep
    has ended before it.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / LOG).open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        (job.folder / FAILED).unlink(missing_ok=True)
        where: Any = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        where |= dict(env=environment(slot), start_new_session=True)
        return Process(job, slot, subprocess.Popen(job.command, **where), log.tell())


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
            time.sleep(0.05)


def why(process: Process) -> str:
    """Say how a process has ended, with the last error or line in its log."""
    status = process.popen.returncode
    number = -status if status < 0 else status - 128  # a shell's
    ended = f"exit status {status}"
    if number in set(signal.Signals):
        ended = f"killed by signal {number} ({signal.Signals(number).name})"
    if number == signal.SIGKILL:
        return f"{ended}: out of memory?"
    log = (process.job.folder / LOG).read_bytes()[process.offset :].decode(errors="replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    return ": ".join([ended, *(errors or lines)[-1:]])


def run_all(jobs: list[Job], slots: Any) -> list[tuple[Job, str]]:
    """Run jobs, telling of each on a line; return those that failed, with the reason.

    Args:
        jobs: in the order in which they are started; one that starts from another of them waits.
        slots: see make_slots.
    """
    free, waiting = make_slots(slots), list(jobs)
    running: list[Process] = []
    failed: dict[Any, tuple[Job, str]] = {}

    def fail(job: Job, reason: str) -> None:
        failed[job.folder] = job, reason
        print(f"job {job.number} failed: {job.name} ({reason})", flush=True)

    try:
        while running or waiting:
            unfinished = {job.folder for job in waiting + [process.job for process in running]}
            for job in [job for job in waiting if job.source not in unfinished][: len(free)]:
                waiting.remove(job)
                text = f"running: {job.name} ({job.folder / LOG})"
                if job.source in failed:
                    fail(job, f"not begun: it starts from {job.source}, which failed")
                    continue
                if job.state() == "finished":
                    text = f"finished: {job.name} (its source has the same result as before)"
                elif process := start(job, free[0]):
                    running.append(process)
                    free.pop(0)
                else:
                    fail(job, f"it runs already, see {job.folder / LOG}")
                    continue
                print(f"job {job.number} {text}", flush=True)
            for process in [process for process in running if process.popen.poll() is not None]:
                job = process.job
                running.remove(process)
                free.append(process.slot)
                stop([process.popen])  # what it may have left behind
                if process.popen.returncode == 0 and job.state() == "finished":
                    print(f"job {job.number} finished: {job.name}", flush=True)
                else:
                    fail(job, reason := why(process))
                    write_json(dict(job=job.name, reason=reason), job.folder / FAILED)
            time.sleep(0.1)
    finally:
        stop([process.popen for process in running])
    return list(failed.values())
