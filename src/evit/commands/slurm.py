"""A sweep on SLURM: a job array, through submitit, whose jobs are requeued and go on."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import submitit

from evit.commands.jobs import GRACE, Job, stop
from evit.config import CONF_DIR, OUTPUTS, counted

JOB_ID = "slurm_job"  # in the folder of a run: its id in SLURM


class Task:
    """What each of SLURM's tasks does: the run's command. Together they are its processes."""

    def __init__(self, job: Job, tasks: int):
        self.command, self.tasks = job.command, tasks
        self.popen: subprocess.Popen | None = None

    def __call__(self) -> None:
        """Run, and go on with the run where SLURM has requeued the job."""
        started = int(os.environ["SLURM_NTASKS"])
        if started != self.tasks:
            raise RuntimeError(f"SLURM has started {started} tasks instead of {self.tasks}")
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            self.command = [part for part in self.command if part != "overwrite=true"]
        print(" ".join(self.command), flush=True)
        # In a session of its own, or the signal that asks for a checkpoint would end it.
        self.popen = subprocess.Popen(self.command, start_new_session=True)
        status = self.popen.wait()
        if status == 128 + signal.SIGTERM:
            time.sleep(GRACE)  # SLURM preempts this job, and is about to end it
        if status:
            raise RuntimeError(f"exit status {status}: {' '.join(self.command)}")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop before the end of time or preemption; submitit requeues the job."""
        if self.popen:
            stop([self.popen])
        self.popen = None
        return submitit.helpers.DelayedSubmission(self)


def queued() -> set[str]:
    """The ids of this user's jobs that wait or run."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"launcher=slurm needs a working SLURM: {error}") from error
    return set(shown.split())


def job_id(folder: Path | None) -> str | None:
    """The id under which the run of a folder was last submitted."""
    path = folder and folder / JOB_ID
    return path.read_text().strip() if path and path.is_file() else None


def submit(name: str, jobs: list[Job], options: dict[str, Any]) -> None:
    """Submit the jobs that are not in the queue, as an array NAME.

    options are each job's, as submitit's AutoExecutor names them; a ValueError if it has no such.
    """
    there, tasks = queued(), options["nodes"] * options["tasks_per_node"]
    todo = [job for job in jobs if job_id(job.folder) not in there]
    folders = {job.folder for job in todo}
    later = [job for job in todo if job.source in folders or job_id(job.source) in there]
    first = [job for job in todo if job not in later]
    logs, source = OUTPUTS / "slurm" / name / "%j", shlex.quote(str(CONF_DIR.parent / "src"))
    executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=1000)
    own: dict[str, Any] = dict(name=name, slurm_setup=[f'export PYTHONPATH={source}:"$PYTHONPATH"'])
    own |= {key: value for key, value in options.items() if value is not None}
    more = dict(requeue=True) | own.pop("slurm_additional_parameters", {})

    def note(job: Job, sent: submitit.Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / JOB_ID).write_text(f"{sent.job_id}\n")
        print(f"job {job.number} submitted as {sent.job_id}: {job.name}")

    try:
        executor.update_parameters(**own, slurm_additional_parameters=more)
        with executor.batch():  # one job array
            array = [executor.submit(Task(job, tasks)) for job in first]
        for job, sent in zip(first, array, strict=True):
            note(job, sent)
        for job in later:
            after = more | dict(dependency=f"afterok:{job_id(job.source)}")
            executor.update_parameters(slurm_additional_parameters=after)
            note(job, executor.submit(Task(job, tasks)))
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        raise ValueError(f"SLURM refuses: {error}") from error
    except (NameError, TypeError) as error:
        raise ValueError(f"slurm: {error}") from error
    print(f"{counted(len(todo), 'run')} submitted, {len(jobs) - len(todo)} in the queue before")
