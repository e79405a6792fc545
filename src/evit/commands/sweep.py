"""src/sweep.py: the runs of a file of sweeps/, each a process, and only those not finished."""

import fcntl
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from evit.commands import NOT_COMPOSED, check_spelling, composed
from evit.config import CONF_DIR, OUTPUTS, counted, listed, overridden, plain
from evit.report import results

SWEEPS, KNOBS = CONF_DIR.parent / "sweeps", CONF_DIR / "sweep.yaml"
# The programs: their configuration, and the file that a run of them leaves.
PROGRAMS = {"train": ("config", "result.json"), "evaluate": ("evaluate", "evaluation.json")}
# In the folder of a run: its output, why it failed (for the report), and its id in SLURM.
LOG, FAILED, JOB_ID = "run.log", "failed.json", "slurm_job"
GRACE = 60  # seconds for a run to end after SIGTERM
MISTAKES = (*NOT_COMPOSED, ValueError, OSError)
# What torchrun, SLURM and MPI tell the processes that they start: a run is to start its own.
LAUNCHERS = re.compile(
    "(LOCAL_|NODE_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$|(SLURM|TORCHELASTIC|PMIX?|OMPI|GROUP|ROLE)_"
)


@dataclass
class Sweep:
    """A file of sweeps/."""

    runs: list[Any]  # each a line with commas, as for a multirun; or {run: ..., starts_from: ...}
    program: str = "train"
    overrides: str = ""  # for every run
    needs: list[str] = field(default_factory=list)  # knobs that the file leaves to the user


@dataclass
class Job:
    """One run of a sweep."""

    program: str
    overrides: list[str]
    folder: Path
    source: Path | None = None  # folder of the run whose best checkpoint this one starts from
    error: str = ""  # why it does not compose
    cfg: Any = None
    config: dict[str, Any] = field(default_factory=dict)  # plain values, as the run writes them
    number: int = 0
    hours: float = 0  # on the paper's GPUs, as estimated
    paper: str = ""  # its top-1 in the paper
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
        result = self.folder / PROGRAMS[self.program][1]
        training = self.program == "train"
        before = results.read_json(self.folder / "config.json" if training else result)
        missing = "failed" if (self.folder / FAILED).is_file() else "missing"
        if self.error or before is None:
            return "broken" if self.error else missing
        given = {knob: value for knob, value in self.config.items() if value is not None}
        same = before == self.config if training else given.items() <= before["config"].items()
        if self.source and (noted := results.read_json(self.folder / results.START)):
            same &= results.outcome(self.source) in (None, noted)
        return ("finished" if result.is_file() else missing) if same else "changed"


def run(arguments: list[str]) -> int:
    """Run the sweep that the command line asks for; return the exit status."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(KNOBS.read_text() + f"\nSweeps: {', '.join(names())}")
        return 0
    name, *rest = arguments
    cfg, more = split(rest)
    sweep = read(name)
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
    runs, before = counted(len(jobs), "run"), len(sound) - len(todo)
    print(f"{runs}, of which {before} have finished before", flush=True)
    failed += run_all(sound, cfg["slots"])
    show(name, jobs)
    tell_failed(failed)
    return bool(failed)


def names() -> list[str]:
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def read(name: str) -> Sweep:
    """Read a file of sweeps/; a ValueError if there is none, or it has an unknown entry."""
    if name not in names():
        raise ValueError(f"there is no sweep {name!r} in sweeps/, but {', '.join(names())}")
    try:
        return Sweep(**yaml.safe_load((SWEEPS / f"{name}.yaml").read_text()))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"sweeps/{name}.yaml: {error}") from error


def split(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split a command line into the sweep's own knobs, and the overrides of all of its runs."""
    arguments = ["dry_run=true" if a == "--dry-run" else a for a in arguments]
    knobs = OmegaConf.load(KNOBS)
    own = [a for a in arguments if {name.split(".")[0] for name in overridden([a])} <= set(knobs)]
    try:
        merged: Any = OmegaConf.to_container(OmegaConf.merge(knobs, OmegaConf.from_dotlist(own)))
    except NOT_COMPOSED as error:
        raise ValueError(f"{' '.join(own)}: {str(error).splitlines()[0]}") from error
    if merged["launcher"] not in ("local", "slurm"):
        raise ValueError(f"launcher must be local or slurm, got {merged['launcher']!r}")
    return merged, [a for a in arguments if a not in own]


def make_jobs(name: str, sweep: Sweep, more: list[str]) -> list[Job]:
    """Make the runs of a sweep, each once, with more overrides; a ValueError if none composes."""
    found: dict[Path, Job] = {}
    for entry in sweep.runs:
        for job in jobs_of(dict(run=entry) if isinstance(entry, str) else entry, sweep, more):
            job.number, job.error = len(found), " ".join(job.error.split())
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
    except MISTAKES as error:
        return [Job(sweep.program, [entry["run"]], Path(entry["run"]), error=str(error))]
    return [make_job(sweep.program, overrides, source) for overrides in runs]


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


def make_job(program: str, overrides: list[str], source: Path | None = None) -> Job:
    """The job of a run; with an error, and a folder that tells it apart, if it does not compose."""
    config_name, _ = PROGRAMS[program]
    if "keep_rate=1" in overrides:  # there is nothing to fuse
        overrides = [word for word in overrides if not word.startswith("fusion=")]
    try:
        check_spelling(overrides, config_name)
        cfg = composed(config_name, overrides, scaled=program == "train")
        HydraConfig.instance().set_config(cfg)
        # An evaluation completes its groups from the checkpoint's run.
        knobs = [str(knob) for knob in cfg if not isinstance(cfg[knob], DictConfig)]
        own: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, knobs), resolve=True)
        config = plain(cfg) if program == "train" else own
    except MISTAKES as error:
        return Job(program, overrides, Path(" ".join(overrides)), error=str(error))
    return Job(program, overrides, Path(cfg.hydra.run.dir), source, cfg=cfg, config=config)


def estimate(job: Job, needs: list[str]) -> None:
    """Note the GPU hours of a training run, and the paper's top-1, as if all needs were given."""
    from evit.commands.plan import GPUS, plan

    cfg = job.cfg.copy()
    for knob in set(needs) - {"data.root"}:  # without a root, ImageNet is meant
        OmegaConf.update(cfg, knob, OmegaConf.select(cfg, knob) or "PATH")
    try:
        found = plan(cfg)
        job.hours = (found["hours"] or 0) * GPUS
        job.paper = str(found["paper"][0]["top1"]) if found["paper"] else ""
    except Exception as error:  # of a model that Hydra calls in vain, say
        job.error = " ".join(str(error).split())


def show(name: str, jobs: list[Job], estimated: bool = False) -> None:
    """Print the jobs of a sweep, their states and results; and their hours, if estimated."""
    heads = ["job", f"python src/{jobs[0].program}.py", "state", "top-1"]
    table, states = Table(*heads, *["paper", "GPU hours"] * estimated, box=None), list[str]()
    for job in jobs:
        states.append(state := job.state())
        result = results.finished(job.folder) if state == "finished" else None
        top1 = f"{result['top1']:.2f}" if result else ""
        more = [job.paper, f"{job.hours:.0f}"] * estimated
        table.add_row(str(job.number), job.name, state, top1, *more)
    print(f"sweep {name}: {counted(len(jobs), 'run')}, {states.count('finished')} finished")
    Console(markup=False, highlight=False).print(table)
    if total := sum(job.hours for job in jobs):
        print(f"{total:.0f} GPU hours in all, as estimated (docs/imagenet.md, Hours)")


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
class Task:
    """The work of one SLURM task: the run's command. The tasks are the run's processes."""

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
    """Submit the jobs that are not in the queue as an array, with submitit's options for each."""
    import submitit

    def job_id(folder: Path | None) -> str:  # under which its run was last submitted
        path = (folder or Path()) / JOB_ID
        return path.read_text().strip() if path.is_file() else ""

    def send(jobs: list[Job], **more: Any) -> None:
        executor.update_parameters(slurm_additional_parameters=extra | more)
        with executor.batch():  # one job array
            array = [executor.submit(Task(job.command)) for job in jobs]
        for job, sent in zip(jobs, array, strict=True):
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / JOB_ID).write_text(f"{sent.job_id}\n")
            print(f"job {job.number} submitted as {sent.job_id}: {job.name}")

    queue = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    setup = f'export PYTHONPATH={shlex.quote(str(CONF_DIR.parent / "src"))}:"$PYTHONPATH"'
    given = {key: value for key, value in options.items() if value is not None}
    extra = dict(requeue=True) | given.pop("slurm_additional_parameters", {})
    logs, failed = OUTPUTS / "slurm" / name / "%j", submitit.core.utils.FailedJobError
    try:
        there = subprocess.run(queue, capture_output=True, text=True, check=True).stdout.split()
        todo = [job for job in jobs if job_id(job.folder) not in there]
        folders = {job.folder for job in todo}
        later = [job for job in todo if job.source in folders or job_id(job.source) in there]
        executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=1000)
        executor.update_parameters(**dict(name=name, slurm_setup=[setup]) | given)
        send([job for job in todo if job not in later])
        for job in later:
            send([job], dependency=f"afterok:{job_id(job.source)}")
    except (OSError, subprocess.CalledProcessError, failed, NameError, TypeError) as error:
        raise ValueError(f"launcher=slurm: {error}") from error
    print(f"{counted(len(todo), 'run')} submitted, {len(jobs) - len(todo)} in the queue before")
