"""Read the runs, evaluations and benchmarks below a folder; name what cannot be read."""

import base64
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from evit.files import printable
from evit.report import Row, results

# A reduced model may differ in these values from the dense run that it is compared with.
OWN = dict(
    model="_target_ model_name pretrained keep_rate drop_loc fusion img_size reducer".split(),
    data=results.OWN_DATA,
    recipe="shrink_start_epoch shrink_epochs token_multiple ratio_weight distill_weight teacher "
    "max_batch_per_process eval_every".split(),
)
# Absolute paths in overrides, as the names of run folders have them.
PATHS = re.compile(r"((?:root|dir|checkpoint|teacher|label_maps|source|target)-)_[^+/]*")
NAMES = ["result", "runs", "evaluation", "benchmark"]  # of JSON files, in this order


@dataclass
class Found:
    """What lies below a folder: runs and curves by name, pictures (URIs) by setting, the rest."""

    source: Path
    runs: dict[str, Row] = field(default_factory=dict)
    curves: dict[str, list[Row]] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    evaluations: list[Row] = field(default_factory=list)
    benchmarks: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def shown(self, text: Any) -> str:
        """Strip text of the machine's paths, which names of run folders repeat."""
        return printable(PATHS.sub(r"\1...", str(text).replace(f"{self.source}/", "")))

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Turn errors of a damaged file into an entry of `problems`."""
        try:
            yield
        except Exception as error:  # of json, PIL, or of what is computed from its entries
            self.problems.append(self.shown(f"{path} cannot be read: {error!r}"))

    def add(self, name: str, run: Row) -> bool:
        """Add a run unless it is known; another result of its setting and seed is a problem."""
        keys = ("setting", "from_checkpoint", "seed")
        same = [k for k, row in self.runs.items() if all(run[key] == row[key] for key in keys)]
        if not same:
            self.runs[name] = run
        elif run["top1"] != self.runs[same[0]]["top1"]:
            self.problems.append(f"{name} is left out: {same[0]} has its setting and its seed")
        return not same

    def add_folder(self, name: str, folder: Path) -> None:
        """Add a run's metrics.jsonl, whose last line may be cut, and its picture."""
        with self.reading(path := folder / "metrics.jsonl"):
            for line in path.read_text().splitlines():
                self.curves.setdefault(name, []).append(json.loads(line))
        with self.reading(path := folder / "kept_patches.png"):
            if path.is_file() and self.runs[name]["reducer"] != "none":  # as WebP it is a fifth
                Image.open(path).convert("RGB").save(file := io.BytesIO(), "WEBP", quality=92)
                coded = base64.b64encode(file.getvalue()).decode()
                setting = self.runs[name]["setting"]
                self.pictures.setdefault(setting, f"data:image/webp;base64,{coded}")


def read(source: Path) -> Found:
    """Read all files of NAMES below a folder, or one of them; ValueError: there is none."""
    found = Found(source.parent if source.is_file() else source)
    paths = [source] if source.is_file() else sorted(source.rglob("*.json"))
    known = [path for name in NAMES for path in paths if path.stem == name]
    for path in known:
        with found.reading(path):
            content, name = printable(json.loads(path.read_text())), found.shown(path.parent)
            if path.stem == "result" and found.add(name, row(content)):
                found.add_folder(name, path.parent)
            elif path.stem == "runs":
                for i, run in enumerate(content, 1):
                    found.add(f"{found.shown(path)}, run {i}", run)
            elif path.stem == "evaluation":
                found.evaluations.append(content)
            elif path.stem == "benchmark":
                found.benchmarks += [dict(device=content["device"]) | r for r in content["rows"]]
    begun = {path.parent for path in paths if path.stem in ("config", "failed")}
    for folder in sorted(begun - {path.parent for path in known}):
        failed = results.read_json(folder / "failed.json") or dict(reason="no result.json")
        reason = re.sub(r"(?<!\S)/\S*/", ".../", failed["reason"])
        found.problems.append(found.shown(f"{folder} has not finished: {reason}"))
    if not known and not found.problems:
        raise ValueError(f"no run has finished in {str(source)!r}: no result.json is below it")
    by = ("model", "keep_rate", "fusion")
    runs = sorted(found.runs.items(), key=lambda r: ([str(r[1][k]) for k in by], r[1]["seed"]))
    found.runs = dict(runs)
    return found


def row(result: Row) -> Row:
    """Make the row of a run in runs.json from its result.json, without the machine's paths."""
    config, recipe, data = result["config"], result["config"]["recipe"], result["data"]
    limits = {name: recipe[name] for name in ("max_train_images", "max_val_images")}
    found = results.summary(result) | dict(timm_name=timm_name(config["model"]), data=data["name"])
    found |= dict(num_classes=data["num_classes"], whole=not any(limits.values())) | limits
    tuned = bool(config["checkpoint"] or config.get("pretrained"))
    found |= dict(epochs=recipe["epochs"], from_checkpoint=tuned, setting=results.setting(config))
    found |= dict(recipe=training(config, result["choices"].get("experiment")))
    found |= dict(started_from=result.get("started_from"), seed=config["seed"])
    return found | {key: result[key] for key in "seconds device precision commit packages".split()}


def training(config: Row, experiment: str | None) -> str:
    """Hash how a run was trained; a dense model and its reduced variants hash alike."""
    model, data, recipe = (
        {key: value for key, value in config[part].items() if key not in names}
        for part, names in OWN.items()
    )
    if experiment == "deit_s" and recipe["batch_size"] == 1024:
        recipe["batch_size"] = 2048  # as published: EViT's batch, and with it lr, is twice DeiT's
    sized = model.keys() >= {"embed_dim", "depth", "num_heads"}  # the name only says the size
    name = "" if sized else bare(config["model"].get("model_name", ""))
    tuned = bool(config["checkpoint"] or config.get("pretrained"))
    return results.digest((name, config["img_size"], tuned, model, data, recipe))


def bare(name: str) -> str:
    """Strip a name of conf/model or timm to what a dense model and its reduced ones share."""
    return re.sub("^(evit|dynamicvit)_|_224$", "", name)


def timm_name(model: Row) -> str | None:
    """Return the model's name in timm's registry, if its architecture is timm's."""
    return model.get("model_name") if model.keys() <= {*OWN["model"]} - {"drop_loc"} else None
