"""Read the runs, evaluations and benchmarks below a folder; name what cannot be read."""

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from evit.report import results, rows
from evit.report.rows import Row

BROKEN = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    *(RecursionError, Image.DecompressionBombError),
)
# Values of overrides that are absolute paths, as the names of run folders have them.
PATHS = re.compile(r"((?:root|dir|checkpoint|teacher|label_maps|source|target)-)_[^+/]*")


@dataclass
class Run:
    """A finished run: its row, the rows of metrics.jsonl, and kept_patches.png as WebP."""

    row: Row
    name: str
    curves: list[Row] = field(default_factory=list)
    picture: bytes | None = None

    @property
    def folder(self) -> str:
        return str(Path(self.name).parent)


@dataclass
class Found:
    """Everything below a folder; evaluations and benchmarks are as in their files."""

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
        ValueError: there is none of them.
    """
    found = Found()
    readers: dict[str, Callable[[Found, Path, str], None]] = {
        "config.json": failure,
        "failed.json": failure,
        "result.json": one_run,
        "runs.json": many_runs,  # after the runs themselves, whose folders hold more
        "evaluation.json": evaluation,
        "benchmark.json": benchmark,
    }
    paths = [source] if source.is_file() else sorted(source.rglob("*.json"))
    for path in sorted(paths, key=lambda path: [*readers, path.name].index(path.name)):
        if path.name in readers:
            with Attempt(found, shown(path, source)):
                readers[path.name](found, path, shown(path, source))
    if not any(vars(found).values()):
        raise ValueError(f"no run has finished in {str(source)!r}: no result.json is below it")
    keys = ("model", "keep_rate", "fusion")
    found.runs.sort(key=lambda run: ([str(run.row[key]) for key in keys], run.row["seed"]))
    return found


@dataclass
class Attempt:
    """A context in which a file that is not what it should be is a problem and no error."""

    found: Found
    name: str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, _: Any) -> bool:
        if isinstance(error, BROKEN):
            said = printable(re.sub(r"(?<![^\s'\"])/[^'\"]*/", "", f"{kind.__name__}: {error}"))
            self.found.problems.append(f"{self.name} cannot be read ({said})")
        return error is None or isinstance(error, BROKEN)


def shown(path: Path, source: Path) -> str:
    """A path below the source, without the machine's paths that names of run folders repeat."""
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


def failure(found: Found, path: Path, name: str) -> None:
    """Name a run that has not finished, with the reason if a sweep has noted one."""
    better = ["result.json", "evaluation.json"]
    if path.name == "config.json":
        better = ["result.json", "failed.json"]
    if not any(path.with_name(other).is_file() for other in better):
        reason = "no result.json" if path.name == "config.json" else load(path)["reason"]
        reason = re.sub(r"(?<!\S)/\S*/", ".../", reason)  # paths of the machine
        found.problems.append(f"{Path(name).parent} has not finished: {reason}")


def one_run(found: Found, path: Path, name: str) -> None:
    """Add the run that has finished in a folder, with what can be read of its other files."""
    run = Run(checked(rows.row(load(path))), str(Path(name).parent))
    if add(found, run):
        with Attempt(found, str(Path(name).with_name("metrics.jsonl"))):
            for line in path.with_name("metrics.jsonl").read_text().splitlines():
                logged = json.loads(line)  # the last line of a killed run may be cut
                need(logged, "step")
                run.curves.append(logged)
        with Attempt(found, str(Path(name).with_name("kept_patches.png"))):
            if (picture := path.with_name("kept_patches.png")).is_file():
                run.picture = webp(picture)


def webp(path: Path) -> bytes:
    """A picture as WebP, a fifth of the size, without other data that its file may hold."""
    content = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(content, "WEBP", quality=92)
    return content.getvalue()


def many_runs(found: Found, path: Path, name: str) -> None:
    for i, row in enumerate(load(path)):
        dense = results.one_rate(row["keep_rate"]) == 1
        reducer = "none" if dense else results.reducer_name(None, row["model"])
        add(found, Run(checked(dict(reducer=reducer) | row), f"{name}, run {i + 1}"))


def add(found: Found, run: Run) -> bool:
    """Add a run unless it is there; name one of the same setting and seed with other numbers."""
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


def evaluation(found: Found, path: Path, _: str) -> None:
    result = load(path)
    need(result["model"], "img_size", texts=("name",))
    need(result["data"], "num_classes", texts=("name",))
    for row in result["settings"]:
        need(row, "top1", "top5", "keep_rate", others=("fusion", "selection", "macs"))
    found.evaluations.append(result)


def benchmark(found: Found, path: Path, _: str) -> None:
    result = load(path)
    need(result, texts=("device",))
    for row in result["rows"]:
        names = ("images_per_s", "ratio", "macs", "batch_size", "img_size", "keep_rate")
        others = ("fusion", "compile", "dense")
        need(row, *names, texts=("model", "what", "precision", "compared_with"), others=others)
    found.benchmarks.append(result)


def checked(row: Row) -> Row:
    """A run's row, if it has all that is computed with."""
    names = ("top1", "top5", "params", "macs", "img_size", "epochs", "seed", "keep_rate")
    others = ("fusion", "from_checkpoint", "commit", "packages")
    need(row, *names, texts=("model", "reducer", "data", "device", "setting"), others=others)
    return row


def need(
    row: Row, *numbers: str, texts: tuple[str, ...] = (), others: tuple[str, ...] = ()
) -> None:
    """Refuse a row that lacks an entry, or has one that is no (list of) finite numbers."""
    for name in numbers:
        for value in row[name] if isinstance(row[name], list) else [row[name]]:
            if isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name} is {row[name]!r}")
    for name in texts:
        if not isinstance(row[name], str):
            raise ValueError(f"{name} is {row[name]!r}")
    if missing := set(others) - row.keys():
        raise KeyError(*missing)


def load(path: Path) -> Any:
    return printable(json.loads(path.read_text()))
