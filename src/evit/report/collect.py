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

from evit.report import results

Row = dict[str, Any]
# Values in which a reduced model may differ from the dense run that it is compared with.
OWN_MODEL = {"_target_", "model_name", "pretrained", "keep_rate", "drop_loc", "fusion", "img_size"}
OWN_MODEL |= {"reducer"}
OWN_RECIPE = {"shrink_start_epoch", "shrink_epochs", "token_multiple", "ratio_weight"}
OWN_RECIPE |= {"distill_weight", "teacher", "max_batch_per_process", "eval_every"}
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
    for path in sorted((p for p in paths if p.name in NAMES), key=lambda p: NAMES.index(p.name)):
        with found.reading(path):
            content = printable(json.loads(path.read_text()))
            if path.name == "result.json":
                run = Run(row(content), found.shown(path.parent))
                if add(found, run):
                    read_more(found, run, path.parent)
            elif path.name == "runs.json":
                for i, one in enumerate(content):
                    add(found, Run(one, f"{found.shown(path)}, run {i + 1}"))
            else:
                kept = dict(evaluation=found.evaluations, benchmark=found.benchmarks)[path.stem]
                kept.append(content)
    begun = {path.parent for path in paths if path.name in ("config.json", "failed.json")}
    for folder in sorted(begun - {path.parent for path in paths if path.name in NAMES}):
        failed, reason = folder / "failed.json", "no result.json"
        if failed.is_file():
            reason = re.sub(r"(?<!\S)/\S*/", ".../", json.loads(failed.read_text())["reason"])
        found.problems.append(found.shown(f"{folder} has not finished: {reason}"))
    if not any((found.runs, found.evaluations, found.benchmarks, found.problems)):
        raise ValueError(f"no run has finished in {str(source)!r}: no result.json is below it")
    keys = ("model", "keep_rate", "fusion")
    found.runs.sort(key=lambda run: ([str(run.row[key]) for key in keys], run.row["seed"]))
    return found


def read_more(found: Found, run: Run, folder: Path) -> None:
    """Read a run's metrics.jsonl, whose last line may be cut, and its picture."""
    with found.reading(folder / "metrics.jsonl"):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            run.curves.append(json.loads(line))
    path = folder / "kept_patches.png"
    with found.reading(path):
        if path.is_file():
            content = io.BytesIO()
            Image.open(path).convert("RGB").save(content, "WEBP", quality=92)  # a fifth of the size
            run.picture = content.getvalue()


def add(found: Found, run: Run) -> bool:
    """Add a run unless it is there; name one of the same setting and seed with other numbers."""
    keys = ("setting", "from_checkpoint", "seed")
    for other in found.runs:
        if all(run.row[key] == other.row[key] for key in keys):
            if run.row["top1"] != other.row["top1"]:
                text = f"{run.name} has the setting and the seed of {other.name}, and is left out"
                found.problems.append(text)
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


def row(result: dict[str, Any]) -> Row:
    """Make the row of a result.json; it names no folder of the machine."""
    config, recipe = result["config"], result["config"]["recipe"]
    limits = {name: recipe[name] for name in ("max_train_images", "max_val_images")}
    names = ("seconds", "device", "precision", "commit", "packages")
    return results.summary(result) | dict(
        timm_name=timm_name(config["model"]),
        data=result["data"]["name"],
        num_classes=result["data"]["num_classes"],
        whole=not any(limits.values()),
        **limits,
        epochs=recipe["epochs"],
        from_checkpoint=bool(config["checkpoint"] or config.get("pretrained")),
        setting=results.setting(config),
        recipe=training(config, result["choices"].get("experiment")),
        started_from=result.get("started_from"),
        seed=config["seed"],
        **{name: result[name] for name in names},
    )


def training(config: dict[str, Any], experiment: str | None) -> str:
    """Hash how a run was trained; a dense model and its reduced variants have the same hash."""
    own = dict(model=OWN_MODEL, data=results.OWN_DATA, recipe=OWN_RECIPE)
    model, data, recipe = (
        {key: value for key, value in config[part].items() if key not in names}
        for part, names in own.items()
    )
    if experiment == "deit_s" and recipe["batch_size"] == 1024:
        recipe["batch_size"] = 2048  # as published: EViT's batch, and with it lr, is twice DeiT's
    name = re.sub("^(evit|dynamicvit)_|_224$", "", config["model"].get("model_name", ""))
    if model.keys() >= {"embed_dim", "depth", "num_heads"}:
        name = ""  # which only says the size
    fine_tuned = bool(config["checkpoint"] or config.get("pretrained"))
    return results.digest((name, config["img_size"], fine_tuned, model, data, recipe))


def timm_name(model: dict[str, Any]) -> str | None:
    """The model's name in timm's registry, if nothing of its architecture was changed."""
    plain = OWN_MODEL - {"drop_loc"}
    return model.get("model_name") if model.keys() <= plain else None
