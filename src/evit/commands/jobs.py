"""The runs of a file of sweeps/, as jobs: their commands, folders and states, and their list."""

import itertools
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from evit.commands import NOT_COMPOSED, check_spelling, composed
from evit.config import CONF_DIR, counted, overridden, plain
from evit.report import results

SWEEPS, KNOBS = CONF_DIR.parent / "sweeps", CONF_DIR / "sweep.yaml"
RESULTS = dict(train="result.json", evaluate="evaluation.json")  # what a run leaves, by program
FAILED = "failed.json"  # in the folder of a run: why it failed, for the report
MISTAKES = (*NOT_COMPOSED, ValueError, OSError)


@dataclass
class Sweep:  # a file of sweeps/
    runs: list[Any]  # each a line with commas, as for a multirun; or {run: ..., starts_from: ...}
    program: str = "train"
    overrides: str = ""  # for every run
    needs: list[str] = field(default_factory=list)  # knobs that the file leaves to the user


@dataclass
class Job:  # one run of a sweep
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
        anew = ["overwrite=true"] * (self.program == "train" and self.state() == "changed")
        return [sys.executable, f"{CONF_DIR.parent}/src/{self.program}.py", *self.overrides, *anew]

    def state(self) -> str:
        """One of broken, missing, failed, finished, or changed: another configuration or source."""
        result, training = self.folder / RESULTS[self.program], self.program == "train"
        before = results.read_json(self.folder / "config.json" if training else result)
        missing = "failed" if (self.folder / FAILED).is_file() else "missing"
        if self.error or before is None:
            return "broken" if self.error else missing
        given = {knob: value for knob, value in self.config.items() if value is not None}
        same = before == self.config if training else given.items() <= before["config"].items()
        if self.source and (noted := results.read_json(self.folder / results.START)):
            same &= results.outcome(self.source) in (None, noted)
        return ("finished" if result.is_file() else missing) if same else "changed"


def names() -> list[str]:
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def read(name: str) -> Sweep:
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
    config_name = "config" if program == "train" else program
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
