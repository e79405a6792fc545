"""The files of sweeps/ as jobs: which runs, where each leaves its result, what has finished."""

import itertools
import json
import shlex
import sys
from collections.abc import Iterator
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

from evit.commands.cli import check_spelling, composed, with_scale
from evit.config import CONF_DIR, folder_name, listed, overridden, plain
from evit.report import results

SWEEPS = CONF_DIR.parent / "sweeps"
# The programs: their configuration, and the file that a run of them leaves.
PROGRAMS = {"train": ("config", "result.json"), "evaluate": ("evaluate", "evaluation.json")}
NOT_COMPOSED = (HydraException, OmegaConfBaseException, ValueError, OSError)


@dataclass
class Job:
    """One run of a sweep."""

    program: str
    overrides: list[str]
    cfg: DictConfig
    config: dict[str, Any]  # plain values, as the run writes them
    folder: Path
    source: Path | None = None  # folder of the run whose best checkpoint this one starts from
    number: int = 0
    error: str = ""  # why it does not compose

    @property
    def name(self) -> str:
        return " ".join(self.overrides)

    @property
    def command(self) -> list[str]:
        """The command of the run, which goes on where it stopped, or begins anew if changed."""
        script = CONF_DIR.parent / "src" / f"{self.program}.py"
        anew = self.program == "train" and self.state() == "changed"
        return [sys.executable, str(script), *self.overrides, *["overwrite=true"] * anew]

    def state(self) -> str:
        """Say whether it is missing, finished, or changed: of another configuration or source."""
        result, config = self.folder / PROGRAMS[self.program][1], self.folder / "config.json"
        if self.program == "evaluate":
            if not result.is_file():
                return "missing"
            before = json.loads(result.read_text())["config"]
            given = {k: v for k, v in self.config.items() if v is not None}
            return "finished" if given.items() <= before.items() else "changed"
        if not config.is_file():
            return "missing"
        noted = self.folder / results.START
        if self.source and noted.is_file():
            if results.outcome(self.source) not in (None, json.loads(noted.read_text())):
                return "changed"
        if json.loads(config.read_text()) != self.config:
            return "changed"
        return "finished" if result.is_file() else "missing"


@dataclass
class Sweep:
    """A file of sweeps/."""

    runs: list[Any]  # each a line with commas, as for a multirun; or {run: ..., starts_from: ...}
    program: str = "train"
    overrides: str = ""  # of every run
    needs: list[str] = field(default_factory=list)  # knobs that the file leaves to the user


def names() -> list[str]:
    return sorted(path.stem for path in SWEEPS.glob("*.yaml"))


def read(name: str) -> Sweep:
    """Read a file of sweeps/.

    Raises:
        ValueError: there is none, or it has an unknown entry.
    """
    path = SWEEPS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no sweep {name!r} in sweeps/, but {', '.join(names())}")
    try:
        return Sweep(**yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def expand(line: str, more: list[str]) -> list[list[str]]:
    """Expand "keep_rate=0.5 img_size=256,288" into runs; the later value of a knob wins."""
    choices: dict[str, list[str]] = {}
    for one in OverridesParser.create().parse_overrides([*shlex.split(line), *more]):
        key = one.get_key_element()
        choices[key] = [one.input_line or ""]
        if one.is_sweep_override():  # true, not Python's True, so that folders are named alike
            values = [
                v.lower() if v in ("True", "False") else v for v in one.sweep_string_iterator()
            ]
            choices[key] = [f"{key}={value}" for value in values]
    return [list(run) for run in itertools.product(*choices.values())]


def make_jobs(name: str, sweep: Sweep, more: list[str]) -> list[Job]:
    """Make the runs of a sweep, each once, with more overrides for all of them.

    Raises:
        ValueError: none of them composes.
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


def jobs_of(entry: dict[str, str], sweep: Sweep, more: list[str]) -> Iterator[Job]:
    """Make the runs of an entry of a sweep; one that does not compose is a job with an error."""

    def broken(overrides: list[str], error: Exception) -> Job:
        folder = Path("outputs", folder_name("+".join(overrides)))  # to tell jobs apart
        text = " ".join(str(error).split())
        return Job(sweep.program, overrides, OmegaConf.create(), {}, folder, error=text)

    own, source = more, None
    try:
        if "starts_from" in entry and "checkpoint" not in overridden(more):
            (overrides,) = expand(f"{sweep.overrides} {entry['starts_from']}", more)
            source = make_job("train", overrides).folder
            own = [f"checkpoint={source}/checkpoints/best.ckpt", *more]
        runs = expand(f"{sweep.overrides} {entry['run']}", own)
    except NOT_COMPOSED as error:
        yield broken([entry["run"]], error)
        return
    for overrides in runs:
        try:
            yield make_job(sweep.program, overrides, source)
        except NOT_COMPOSED as error:
            yield broken(overrides, error)


def make_job(program: str, overrides: list[str], source: Path | None = None) -> Job:
    config_name, _ = PROGRAMS[program]
    check_spelling(overrides, config_name)
    cfg = composed(config_name, with_scale(overrides) if program == "train" else overrides)
    HydraConfig.instance().set_config(cfg)
    if program == "evaluate":  # completes its groups from the checkpoint's run
        knobs = [str(k) for k in cfg if k != "hydra" and not isinstance(cfg[k], DictConfig)]
        config: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, knobs), resolve=True)
    else:
        config = plain(cfg)
        fewer = [override for override in overrides if not override.startswith("fusion=")]
        if set(listed(config["keep_rate"])) == {1} and fewer != overrides:
            return make_job(program, fewer, source)  # there is nothing to fuse
    folder = Path(cfg.hydra.run.dir)  # now, while these are Hydra's values
    return Job(program, overrides, cfg, json.loads(json.dumps(config)), folder, source)
