"""What lies below a folder: runs, evaluations and benchmarks. What cannot be read is named."""

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from evit.report import tables

Row = dict[str, Any]
BROKEN = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    *(RecursionError, Image.DecompressionBombError),
)
# Values of overrides that are absolute paths, as folder names have them.
PATHS = re.compile(r"((?:root|dir|checkpoint|teacher|label_maps|source|target)-)_[^+/]*")


@dataclass
class Run:
    """A finished run: its row of a runs.json, its metrics.jsonl, kept_patches.png as WebP."""

    row: Row
    name: str
    curves: list[Row] = field(default_factory=list)
    picture: bytes | None = None

    @property
    def folder(self) -> str:
        """Where it lies with others."""
        return str(Path(self.name).parent)


@dataclass
class Found:
    """Evaluations and benchmarks are what their files hold."""

    runs: list[Run] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    benchmarks: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [run.row for run in self.runs]


def read(source: Path) -> Found:
    """Read every result.json, runs.json, evaluation.json and benchmark.json below a folder.

    Args:
        source: the folder, or one runs.json.

    Raises:
        ValueError: there is none.
    """
    found = Found()
    paths = [source] if source.is_file() else sorted(source.rglob("*.json"))
    for path in paths:
        if path.name in ("config.json", "failed.json") and unfinished(path):
            attempt(found, path, source, failure, found, path, source)
        if path.name == "result.json":
            attempt(found, path, source, one_run, found, path, source)
    for path in paths:
        if path.name == "runs.json":  # after the runs themselves, whose folders have more
            attempt(found, path, source, many_runs, found, path, source)
        elif path.name == "evaluation.json":
            attempt(found, path, source, evaluation, found, path)
        elif path.name == "benchmark.json":
            attempt(found, path, source, benchmark, found, path)
    if not any(vars(found).values()):
        raise ValueError(f"no run has finished in {str(source)!r}: no result.json is below it")
    found.runs.sort(key=lambda run: order(run.row))
    return found


def order(row: Row) -> tuple[Any, ...]:
    return row["model"], str(row["keep_rate"]), row["fusion"], row["seed"]


def attempt(
    found: Found, path: Path, source: Path, step: Callable[..., None], *arguments: Any
) -> None:
    """Do a step; that the file at path is not what it should be is a problem and no error."""
    try:
        step(*arguments)
    except BROKEN as error:
        said = f"{type(error).__name__}: {error}".replace(str(path), path.name)
        found.problems.append(f"{shown(path, source)} cannot be read ({printable(said)})")


def shown(path: Path, source: Path) -> str:
    """A path below the source, without those of the machine that names of run folders repeat."""
    name = path.name if path == source else str(path.relative_to(source))
    return printable(PATHS.sub(r"\1...", name))


def printable(value: Any) -> Any:
    """JSON without what a terminal, a table or an SVG would take for more than letters."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "?" for c in value)
    if isinstance(value, list):
        return [printable(entry) for entry in value]
    if isinstance(value, dict):
        return {printable(key): printable(entry) for key, entry in value.items()}
    return value


def unfinished(path: Path) -> bool:
    """Whether the run of a config.json, or the job of a failed.json, has left no result."""
    left = ["result.json", "evaluation.json"]
    if path.name == "config.json":
        left = ["result.json", "failed.json"]  # which says more
    return not any(path.with_name(name).is_file() for name in left)


def failure(found: Found, path: Path, source: Path) -> None:
    """Name a run that has not finished, and the reason that a sweep has noted."""
    reason = "no result.json" if path.name == "config.json" else load(path)["reason"]
    reason = re.sub(r"(?<!\S)/\S*/", ".../", reason)  # paths of the machine
    found.problems.append(f"{shown(path.parent, source)} has not finished: {reason}")


def one_run(found: Found, path: Path, source: Path) -> None:
    """Add the run that has finished in a folder, with what can be read of its other files."""
    run = Run(checked(tables.row(load(path))), shown(path.parent, source))
    if add(found, run):
        metrics, picture = path.with_name("metrics.jsonl"), path.with_name("kept_patches.png")
        attempt(found, metrics, source, read_curves, run, metrics)
        if picture.is_file():
            attempt(found, picture, source, read_picture, run, picture)


def many_runs(found: Found, path: Path, source: Path) -> None:
    for i, row in enumerate(load(path)):
        add(found, Run(checked(row), f"{shown(path, source)}, run {i + 1}"))


def add(found: Found, run: Run) -> bool:
    """Add a run, unless it is there: the same one silently, another of its setting and seed not."""
    row = run.row
    for other in found.runs:
        if all(row[key] == other.row[key] for key in ("setting", "from_checkpoint", "seed")):
            if any(row[key] != other.row[key] for key in row.keys() & other.row.keys()):
                found.problems.append(
                    f"{run.name} has the setting and the seed of {other.name}, and is left out"
                )
            return False
    found.runs.append(run)
    return True


def evaluation(found: Found, path: Path) -> None:
    result = load(path)
    need(result["model"], "img_size", texts=("name",))
    need(result["data"], "num_classes", texts=("name",))
    for row in result["settings"]:
        need(row, "top1", "top5", "keep_rate", others=("fusion", "selection", "macs"))
    found.evaluations.append(result)


def benchmark(found: Found, path: Path) -> None:
    result = load(path)
    need(result, texts=("device",))
    for row in result["rows"]:
        names = ("images_per_s", "ratio", "macs", "batch_size", "img_size", "keep_rate")
        others = ("fusion", "compile", "dense")
        need(row, *names, texts=("model", "what", "precision", "compared_with"), others=others)
    found.benchmarks.append(result)


def checked(row: Row) -> Row:
    """A run's row, if everything is in it that is computed with."""
    names = ("top1", "top5", "params", "macs", "img_size", "epochs", "seed", "keep_rate")
    others = ("fusion", "from_checkpoint", "commit", "packages")
    need(row, *names, texts=("model", "data", "device", "setting"), others=others)
    return row


def need(
    row: Row, *numbers: str, texts: tuple[str, ...] = (), others: tuple[str, ...] = ()
) -> None:
    """Refuse a row without these entries, or with one that is no (list of) finite numbers."""
    for name in numbers:
        for value in row[name] if isinstance(row[name], list) else [row[name]]:
            if isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name} is {row[name]!r}")
    for name in texts:
        if not isinstance(row[name], str):
            raise ValueError(f"{name} is {row[name]!r}")
    for name in others:
        if name not in row:
            raise KeyError(name)


def load(path: Path) -> Any:
    return printable(json.loads(path.read_text()))


def read_curves(run: Run, path: Path) -> None:
    """Read the logged rows, up to one that is broken: the last, of a run that was killed."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        need(row, "step")
        run.curves.append(row)


def read_picture(run: Run, path: Path, quality: int = 82) -> None:
    """Read a picture as WebP, a tenth of the size, without what else its file may hold."""
    content = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(content, "WEBP", quality=quality)
    run.picture = content.getvalue()
