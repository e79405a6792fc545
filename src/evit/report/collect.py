"""Read the runs, evaluations and benchmarks below a folder; name what cannot be read."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from evit.report import rows
from evit.report.rows import Row

# Values of overrides that are absolute paths, as the names of run folders have them.
PATHS = re.compile(r"((?:root|dir|checkpoint|teacher|label_maps|source|target)-)_[^+/]*")
NAMES = ["result.json", "runs.json", "evaluation.json", "benchmark.json"]  # in this order


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

    source: Path
    runs: list[Run] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    benchmarks: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [run.row for run in self.runs]

    def shown(self, text: Any) -> str:
        """Text without the machine's paths, which names of run folders repeat."""
        return printable(PATHS.sub(r"\1...", str(text).replace(f"{self.source}/", "")))

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """A context in which a file that is not what it should be is a problem and no error."""
        try:
            yield
        except Exception as error:  # of json, PIL, or of what is computed from its entries
            reason = self.shown(f"{type(error).__name__}: {error}")
            self.problems.append(f"{self.shown(path)} cannot be read ({reason})")


def read(source: Path) -> Found:
    """Read every result.json, runs.json, evaluation.json and benchmark.json below a folder.

    Args:
        source: the folder, or one runs.json.

    Raises:
        ValueError: there is none of them.
    """
    found = Found(source.parent if source.is_file() else source)
    paths = [source] if source.is_file() else sorted(source.rglob("*.json"))
    for name in NAMES:
        for path in (path for path in paths if path.name == name):
            with found.reading(path):
                content = printable(json.loads(path.read_text()))
                if name == "result.json":
                    run = Run(rows.row(content), found.shown(path.parent))
                    if add(found, run):
                        read_more(found, run, path.parent)
                elif name == "runs.json":
                    for i, row in enumerate(content):
                        add(found, Run(row, f"{found.shown(path)}, run {i + 1}"))
                else:
                    kept = found.evaluations if name == "evaluation.json" else found.benchmarks
                    kept.append(content)
    begun = {path.parent for path in paths if path.name in ("config.json", "failed.json")}
    for folder in sorted(begun - {path.parent for path in paths if path.name in NAMES}):
        failed, reason = folder / "failed.json", "no result.json"
        if failed.is_file():
            reason = re.sub(r"(?<!\S)/\S*/", ".../", json.loads(failed.read_text())["reason"])
        found.problems.append(found.shown(f"{folder} has not finished: {reason}"))
    if not found.runs + found.evaluations + found.benchmarks + found.problems:  # type: ignore[operator]
        raise ValueError(f"no run has finished in {str(source)!r}: no result.json is below it")
    keys = ("model", "keep_rate", "fusion")
    found.runs.sort(key=lambda run: ([str(run.row[key]) for key in keys], run.row["seed"]))
    return found


def read_more(found: Found, run: Run, folder: Path) -> None:
    """Read a run's metrics.jsonl, whose last line may be cut, and its picture."""
    with found.reading(folder / "metrics.jsonl"):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            run.curves.append(json.loads(line))
    with found.reading(folder / "kept_patches.png"):
        if (folder / "kept_patches.png").is_file():
            content = io.BytesIO()
            with Image.open(folder / "kept_patches.png") as image:
                image.convert("RGB").save(content, "WEBP", quality=92)  # a fifth of the size
            run.picture = content.getvalue()


def add(found: Found, run: Run) -> bool:
    """Add a run unless it is there; name one of the same setting and seed with other numbers."""
    row = run.row
    for other in found.runs:
        if all(row[key] == other.row[key] for key in ("setting", "from_checkpoint", "seed")):
            if row["top1"] != other.row["top1"]:
                found.problems.append(
                    f"{run.name} has the setting and the seed of {other.name}, and is left out"
                )
            return False
    found.runs.append(run)
    return True


def printable(value: Any) -> Any:
    """JSON without what a terminal, a table or an SVG would take for more than letters."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "?" for c in value)
    if isinstance(value, list):
        return [printable(entry) for entry in value]
    if isinstance(value, dict):
        return {printable(key): printable(entry) for key, entry in value.items()}
    return value
