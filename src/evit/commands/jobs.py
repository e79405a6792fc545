"""Read sweeps/*.yaml as jobs: their runs, result folders and states; submit them to SLURM."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evit.commands import check_spelling, composed, with_scale
from evit.config import CONF_DIR, OUTPUTS, counted, listed, overridden, plain
from evit.report import results

SWEEPS = CONF_DIR.parent / "sweeps"
# The programs: their configuration, and the file that a run of them leaves.
PROGRAMS = {"train": ("config", "result.json"), "evaluate": ("evaluate", "evaluation.json")}
FAILED = "failed.json"  # in the folder of a job that failed: why, for the report
JOB_ID = "slurm_job"  # in the folder of a run: its id in SLURM
GRACE = 60  # seconds for a run to end after SIGTERM
NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError, OSError)


@dataclass
class Job:
    """One run of a sweep."""

    program: str
    overrides: list[str]
    folder: Path
    cfg: Any = None
    config: dict[str, Any] = field(default_factory=dict)  # plain values, as the run writes them
    source: Path | None = None  # folder of the run whose best checkpoint this one starts from
    number: int = 0
    error: str = ""  # why it does not compose
    hours: float = 0  # on the paper's GPUs, as estimated
    paper: str = ""  # its top-1 in the paper
    slot: dict[str, str] = field(default_factory=dict)  # environment of its own while it runs
    popen: Any = None
    log_offset: int = 0  # where in its log this try begins

    @property
    def name(self) -> str:
        return " ".join(self.overrides)

    @property
    def command(self) -> list[str]:
        """Command of the run; it continues the run, or begins anew if the run has changed."""
        script = CONF_DIR.parent / "src" / f"{self.program}.py"
        anew = self.program == "train" and self.state() == "changed"
        return [sys.executable, str(script), *self.overrides, *["overwrite=true"] * anew]

    def state(self) -> str:
        """One of broken, missing, failed, finished, or changed: another configuration or source."""
        if self.error:
            return "broken"
        result = self.folder / PROGRAMS[self.program][1]
        path = self.folder / "config.json" if self.program == "train" else result
        missing = "failed" if (self.folder / FAILED).is_file() else "missing"
        if not path.is_file():
            return missing
        before = json.loads(path.read_text())
        given = {k: v for k, v in self.config.items() if v is not None}
        trained = self.program == "train"
        same = before == self.config if trained else given.items() <= before["config"].items()
        if self.source and (noted := results.read_json(self.folder / results.START)):
            same &= results.outcome(self.source) in (None, noted)
        return ("finished" if result.is_file() else missing) if same else "changed"


@dataclass
class Sweep:
    """A file of sweeps/."""

    runs: list[Any]  # each a line with commas, as for a multirun; or {run: ..., starts_from: ...}
    program: str = "train"
    overrides: str = ""  # for every run
    needs: list[str] = field(default_factory=list)  # knobs that the file leaves to the user


def names() -> list[str]:
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def read(name: str) -> Sweep:
    """Read a file of sweeps/; a ValueError if there is none, or it has an unknown entry."""
    path = SWEEPS / f"{name}.yaml"
    if name not in names():
        raise ValueError(f"there is no sweep {name!r} in sweeps/, but {', '.join(names())}")
    try:
        return Sweep(**yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def expand(line: str, more: list[str]) -> list[list[str]]:
    """Expand "keep_rate=0.5 img_size=256,288" into runs; the later value of a knob wins."""
    choices: dict[str, list[str]] = {}
    for one in OverridesParser.create().parse_overrides([*shlex.split(line), *more]):
        key, words = one.get_key_element(), [one.input_line or ""]
        if one.is_sweep_override():  # true, not Python's True, so that folders are named alike
            values = one.sweep_string_iterator()
            words = [f"{key}={v.lower() if v in ('True', 'False') else v}" for v in values]
        choices[key] = words
    return [list(run) for run in itertools.product(*choices.values())]


def make_jobs(name: str, sweep: Sweep, more: list[str]) -> list[Job]:
    """Make the runs of a sweep, each once, with more overrides for all of them.

    A run that does not compose becomes a job with an error; ValueError: none composes.
    """
    found: dict[Path, Job] = {}
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for entry in sweep.runs:
            for job in jobs_of(dict(run=entry) if isinstance(entry, str) else entry, sweep, more):
                job.number = len(found)
                found.setdefault(job.folder, job)
    jobs = list(found.values())
    if all(job.error for job in jobs):
        raise ValueError(jobs[0].error if jobs else f"sweeps/{name}.yaml has no runs")
    return jobs


def jobs_of(entry: dict[str, str], sweep: Sweep, more: list[str]) -> list[Job]:
    """Make the runs of an entry of a sweep."""
    source = None
    try:
        if "starts_from" in entry and "checkpoint" not in overridden(more):
            (overrides,) = expand(f"{sweep.overrides} {entry['starts_from']}", more)
            first = make_job("train", overrides)
            if first.error:
                raise ValueError(first.error)
            source = first.folder
            more = [f"checkpoint={source}/checkpoints/best.ckpt", *more]
        runs = expand(f"{sweep.overrides} {entry['run']}", more)
    except (HydraException, ValueError) as error:
        return [Job(sweep.program, [entry["run"]], Path(entry["run"]), error=one_line(error))]
    return [make_job(sweep.program, overrides, source) for overrides in runs]


def make_job(program: str, overrides: list[str], source: Path | None = None) -> Job:
    """The job of a run; with an error, and a folder that tells it apart, if it does not compose."""
    try:
        cfg, config = compose_job(program, overrides)
    except NOT_COMPOSED as error:
        return Job(program, overrides, Path(" ".join(overrides)), error=one_line(error))
    fewer = [override for override in overrides if not override.startswith("fusion=")]
    if program == "train" and fewer != overrides and set(listed(config["keep_rate"])) == {1}:
        return make_job(program, fewer, source)  # there is nothing to fuse
    return Job(program, overrides, Path(cfg.hydra.run.dir), cfg, config, source)


def compose_job(program: str, overrides: list[str]) -> tuple[Any, dict[str, Any]]:
    """A run's configuration, and what its result will say of it."""
    config_name, _ = PROGRAMS[program]
    check_spelling(overrides, config_name)
    cfg = composed(config_name, with_scale(overrides) if program == "train" else overrides)
    HydraConfig.instance().set_config(cfg)
    if program == "train":
        return cfg, json.loads(json.dumps(plain(cfg)))
    # An evaluation completes its groups from the checkpoint's run.
    knobs = [str(k) for k in cfg if k != "hydra" and not isinstance(cfg[k], DictConfig)]
    config: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, knobs), resolve=True)
    return cfg, config


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def stop(popens: list[subprocess.Popen]) -> None:
    """End processes and their children; a run can continue from its last checkpoint."""
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10)):
        for popen in popens:
            with suppress(ProcessLookupError):
                os.killpg(popen.pid, number)
        until = time.monotonic() + seconds
        while any(popen.poll() is None for popen in popens) and time.monotonic() < until:
            time.sleep(0.05)


class Task:
    """The work of one SLURM task: the run's command. The tasks are the run's processes."""

    def __init__(self, command: list[str]):
        self.command = command
        self.popen: subprocess.Popen | None = None

    def __call__(self) -> None:
        """Run the command; after a requeue, continue the run."""
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

    def checkpoint(self) -> Any:
        """Stop before the end of time or preemption; submitit requeues the job."""
        import submitit

        if self.popen:
            stop([self.popen])
        self.popen = None
        return submitit.helpers.DelayedSubmission(self)


def submit(name: str, jobs: list[Job], options: dict[str, Any]) -> None:
    """Submit the jobs that are not in the queue, through submitit, as an array NAME.

    options are each job's, as submitit's AutoExecutor names them; a ValueError if it has no such.
    """
    import submitit

    def job_id(folder: Path | None) -> str:
        """The id under which the run of a folder was last submitted."""
        path = (folder or Path()) / JOB_ID
        return path.read_text().strip() if folder and path.is_file() else ""

    def note(job: Job, sent: Any) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / JOB_ID).write_text(f"{sent.job_id}\n")
        print(f"job {job.number} submitted as {sent.job_id}: {job.name}")

    queue = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    source = shlex.quote(str(CONF_DIR.parent / "src"))
    own: dict[str, Any] = dict(name=name, slurm_setup=[f'export PYTHONPATH={source}:"$PYTHONPATH"'])
    own |= {key: value for key, value in options.items() if value is not None}
    more = dict(requeue=True) | own.pop("slurm_additional_parameters", {})
    try:
        there = subprocess.run(queue, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"launcher=slurm needs a working SLURM: {error}") from error
    try:
        todo = [job for job in jobs if job_id(job.folder) not in there]
        folders = {job.folder for job in todo}
        later = [job for job in todo if job.source in folders or job_id(job.source) in there]
        first = [job for job in todo if job not in later]
        logs = OUTPUTS / "slurm" / name / "%j"
        executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=1000)
        executor.update_parameters(**own, slurm_additional_parameters=more)
        with executor.batch():  # one job array
            array = [executor.submit(Task(job.command)) for job in first]
        for job, sent in zip(first, array, strict=True):
            note(job, sent)
        for job in later:
            after = more | dict(dependency=f"afterok:{job_id(job.source)}")
            executor.update_parameters(slurm_additional_parameters=after)
            note(job, executor.submit(Task(job.command)))
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        raise ValueError(f"SLURM refuses: {error}") from error
    except (NameError, TypeError) as error:
        raise ValueError(f"slurm: {error}") from error
    print(f"{counted(len(todo), 'run')} submitted, {len(jobs) - len(todo)} in the queue before")
