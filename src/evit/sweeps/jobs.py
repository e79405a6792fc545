"""A file of sweeps/ as jobs: which runs, where each leaves its result, and what has finished."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evit.commands.cli import check_spelling, composed, register, with_scale
from evit.config import CONF_DIR, HOW, folder_name, listed, overridden, plain
from evit.report import results

SWEEPS = CONF_DIR.parent / "sweeps"
# Of each program: its configuration, and what a run of it leaves.
CONFIGS = {"train": "config", "evaluate": "evaluate"}
RESULTS = {"train": "result.json", "evaluate": "evaluation.json"}
NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError)


@dataclass
class Sweep:
    """What is in a file of sweeps/."""

    runs: list[Any] = MISSING  # each a Hydra multirun; or {run: ..., starts_from: ...}
    program: str = "train"
    overrides: str = ""  # of every run
    needs: list[str] = field(default_factory=list)  # knobs that the file leaves to the user


@dataclass
class Job:
    """One run of a sweep."""

    program: str
    overrides: list[str]
    cfg: DictConfig
    config: dict[str, Any]  # its plain values, as the run writes them
    folder: Path
    source: Path | None = None  # folder of the run whose best checkpoint this one starts from
    moved: bool = False  # from where the same command alone would leave it
    number: int = 0
    error: str = ""  # why it does not compose

    @property
    def name(self) -> str:
        return " ".join(self.overrides)

    @property
    def command(self) -> list[str]:
        """What runs it: it goes on where it was interrupted, and begins anew if it has changed."""
        script = CONF_DIR.parent / "src" / f"{self.program}.py"
        command = [sys.executable, str(script), *self.overrides]
        if self.moved:
            command.append(f"hydra.run.dir='{self.folder}'")
        if self.program == "train" and self.state() == "changed":
            command.append("overwrite=true")
        return command

    def state(self) -> str:
        """missing, unfinished (and can go on), finished, or broken: it does not compose.

        Or changed: of another configuration, or begun with another result of its source.
        """
        if self.error:
            return "broken"
        result, config = self.folder / RESULTS[self.program], self.folder / "config.json"
        if self.program == "evaluate":
            if not result.is_file():
                return "missing"
            before = json.loads(result.read_text())["config"]
            given = {k: v for k, v in self.config.items() if v is not None}
            return "finished" if given.items() <= before.items() else "changed"
        if not config.is_file():
            return "missing"
        if json.loads(config.read_text()) != self.config or self.is_stale():
            return "changed"
        return "finished" if result.is_file() else "unfinished"

    def is_stale(self) -> bool:
        """Whether the run that this one has started from has another result by now."""
        noted = self.folder / results.START
        if not self.source or not noted.is_file():
            return False
        return results.outcome(self.source) not in (None, json.loads(noted.read_text()))

    def result(self) -> dict[str, Any] | None:
        """What the run has left, if it has finished."""
        if self.state() != "finished":
            return None
        return json.loads((self.folder / RESULTS[self.program]).read_text())


def names() -> list[str]:
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def read(name: str) -> Sweep:
    """The file of a sweep.

    Raises:
        ValueError: there is none, or something else is in it.
    """
    path = SWEEPS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no sweep {name!r} in sweeps/, but {', '.join(names())}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Sweep), OmegaConf.load(path))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {error}") from error
    sweep: Any = OmegaConf.to_object(merged)
    if sweep.program not in CONFIGS:
        raise ValueError(f"{path}: program must be of {', '.join(CONFIGS)}, got {sweep.program!r}")
    return sweep


def expand(line: str, more: list[str]) -> list[list[str]]:
    """The runs of a Hydra multirun, "keep_rate=0.5 img_size=256,288". What comes later wins."""
    parsed = OverridesParser.create().parse_overrides([*shlex.split(line), *more])
    (runs,) = BasicSweeper.split_arguments(parsed, None)
    return [
        [re.sub(r"(?<=[=[,])(True|False)(?=[],]|$)", lower, text) for text in run] for run in runs
    ]


def lower(found: re.Match) -> str:
    """As people write it, so that the folder of a run is the same."""
    return found[0].lower()


def make_jobs(name: str, sweep: Sweep, more: list[str]) -> list[Job]:
    """The runs of a sweep, each once, with more overrides for all of them.

    Raises:
        ValueError: none of them composes.
    """
    register()
    found: dict[Path, Job] = {}
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for entry in sweep.runs:
            for job in jobs_of(entry, name, sweep, more):
                found.setdefault(job.folder, job)
    jobs = list(found.values())
    for number, job in enumerate(jobs):
        job.number = number
    if all(job.error for job in jobs):
        raise ValueError(jobs[0].error if jobs else f"sweeps/{name}.yaml has no runs")
    return jobs


def jobs_of(entry: Any, name: str, sweep: Sweep, more: list[str]) -> Iterator[Job]:
    """The runs of an entry of a sweep; one that does not compose is a job with an error."""

    def broken(overrides: list[str], error: Exception) -> Job:
        folder = Path("outputs", name, folder_name("+".join(overrides).replace("=", "-")))
        text = " ".join(str(error).split())
        return Job(sweep.program, overrides, OmegaConf.create(), {}, folder, error=text)

    run, first = (entry, None) if isinstance(entry, str) else with_source(entry)
    own, source = more, None
    try:
        if first and "checkpoint" not in overridden(more):
            (overrides,) = expand(f"{sweep.overrides} {first}", more)
            source = make_job("train", overrides).folder
            own = [f"checkpoint={source}/checkpoints/best.ckpt", *more]
        runs = expand(f"{sweep.overrides} {run}", own)
    except NOT_COMPOSED as error:
        yield broken([run], error)
        return
    for overrides in runs:
        try:
            yield make_job(sweep.program, overrides, source)
        except NOT_COMPOSED as error:
            yield broken(overrides, error)


def with_source(entry: dict[str, str]) -> tuple[str, str]:
    if set(entry) != {"run", "starts_from"}:
        raise ValueError(f"a run of a sweep has run and starts_from, got {', '.join(entry)}")
    return entry["run"], entry["starts_from"]


def make_job(program: str, overrides: list[str], source: Path | None = None) -> Job:
    check_spelling(overrides, CONFIGS[program])
    scaled = with_scale(overrides) if program == "train" else overrides
    cfg = composed(CONFIGS[program], scaled)
    HydraConfig.instance().set_config(cfg)
    if program == "evaluate":  # completes its groups from the checkpoint's run
        knobs = [str(k) for k in cfg if k != "hydra" and not isinstance(cfg[k], DictConfig)]
        config: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, knobs), resolve=True)
    else:
        config = plain(cfg)
    fewer = [override for override in overrides if not override.startswith("fusion=")]
    if program == "train" and set(listed(config["keep_rate"])) == {1} and fewer != overrides:
        return make_job(program, fewer, source)  # there is nothing to fuse
    for knob in HOW:
        config.pop(knob, None)
    folder = Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir)
    moved = str(folder) != cfg.hydra.run.dir  # now, while these are Hydra's values
    return Job(program, overrides, cfg, json.loads(json.dumps(config)), folder, source, moved)


def check_needs(name: str, sweep: Sweep, jobs: list[Job]) -> None:
    """Refuse to begin where runs would train on something else than they are for, or not at all.

    Raises:
        ValueError: names the knob.
    """
    for knob in sweep.needs:
        if any(OmegaConf.select(job.cfg, knob) is None for job in jobs if not job.error):
            hint = ", or IMAGENET_DIR=DIR in the environment" if knob == "data.root" else ""
            raise ValueError(f"sweeps/{name}.yaml needs {knob}=PATH{hint}")
