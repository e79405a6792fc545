"""The knobs: their names and types. Everything Hydra-specific that is not composing lives here."""

import difflib
import functools
import gc
import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf

from evit import ending
from evit.recipe import Recipe

CONF_DIR = Path(__file__).parents[2] / "conf"
HOW = (  # and not what is trained
    *("overwrite", "resume", "checkpoint_every_n_steps", "keep_checkpoint_every_n_epochs"),
    "dry_run",
)


@dataclass
class RunConfig:
    """The knobs of src/train.py."""

    name: str = MISSING
    keep_rate: Any = MISSING  # a number, or one for each reorganization
    fusion: bool = MISSING
    img_size: int = MISSING
    seed: int = MISSING
    checkpoint: str | None = None
    pretrained: bool = False
    compile: bool = False
    overwrite: bool = False
    resume: str = "auto"
    checkpoint_every_n_steps: int | None = None
    keep_checkpoint_every_n_epochs: int | None = None
    dry_run: bool = False
    reducer: Any = None
    model: Any = MISSING
    data: Any = MISSING
    recipe: Recipe = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING


@dataclass
class PrepareConfig:
    """The knobs of src/prepare.py."""

    source: str = MISSING
    target: str | None = None
    mode: str = MISSING
    max_resolution: int | None = MISSING
    jpeg_quality: int = MISSING
    num_workers: int | None = MISSING
    skip_bad: bool = MISSING
    label_maps: str | None = None
    imagenet: bool = MISSING


@dataclass
class LabelMapsConfig:
    """The knobs of src/label_maps.py."""

    source: str = MISSING
    target: str = MISSING
    model_name: str = MISSING
    pretrained: bool = MISSING
    checkpoint: str | None = None
    img_size: int | None = None
    crop_pct: float = MISSING
    crop_mode: str = MISSING
    batch_size: int = MISSING
    num_workers: int | None = None


@dataclass
class ReportConfig:
    """The knobs of src/report.py."""

    runs: str = MISSING
    target: str | None = None
    page: bool = MISSING


@dataclass
class EvaluateConfig:
    """The knobs of src/evaluate.py. None: the run's whose checkpoint it is, else a default."""

    checkpoint: str | None = None
    name: str = MISSING
    keep_rate: Any = None
    keep_rates: Any = None
    fusion: Any = None  # true, false, or a list
    gmacs: Any = None
    selection: Any = None  # a name, or a list
    img_size: int | None = None
    crop_pct: float | None = None
    max_val_images: int | None = None
    batch_size: int = MISSING
    seed: int = MISSING
    reducer: Any = None
    model: Any = field(default_factory=dict)
    data: Any = MISSING
    trainer: Any = MISSING


@dataclass
class BenchmarkConfig:
    """The knobs of src/benchmark.py. Any: one value, or a list of them."""

    name: str = MISSING
    what: Any = MISSING
    models: Any = MISSING
    checkpoint: str | None = None
    keep_rates: Any = MISSING
    fusion: Any = MISSING
    reducer: str | None = None
    reducers: Any = None
    img_sizes: Any = MISSING
    batch_sizes: Any = None  # None, here and below: by the device
    precisions: Any = None
    compile: Any = None
    paper: Any = MISSING
    repeats: int = MISSING
    min_seconds: float | None = None
    threads: int | None = None
    device: str = MISSING
    max_images: int | None = None
    seed: int = MISSING
    target: str | None = None
    data: Any = MISSING


@dataclass
class WeightsConfig:
    """A model and its weights. None: the run's whose checkpoint it is, else a default."""

    checkpoint: str | None = None
    pretrained: bool = MISSING
    random: bool = MISSING
    keep_rate: Any = None
    fusion: bool | None = None
    img_size: int | None = None
    target: str | None = None
    seed: int = MISSING
    reducer: Any = None
    model: Any = field(default_factory=dict)


@dataclass
class ExportConfig(WeightsConfig):
    """The knobs of src/export.py."""

    format: str = MISSING


@dataclass
class VisualizeConfig(WeightsConfig):
    """The knobs of src/visualize.py."""

    images: Any = None  # a folder, a file, or a list of them
    num_images: int = MISSING
    crop_pct: float | None = None
    data: Any = MISSING


@dataclass
class DashboardConfig:
    """The knobs of src/dashboard.py."""

    project: str = MISSING
    entity: str | None = None
    paper: bool = MISSING


def folder_name(overrides: str) -> str:
    """A folder name that says what was overridden: short, nothing in it needs quotes."""
    name = re.sub(r"[^\w.+-]+", "_", overrides) or "default"
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name) <= 100 else f"{name[:90]}-{digest}"


def by_data(imagenet: Any, own: Any, embedded: Any, *, _root_: DictConfig) -> Any:
    """One of three values: on ImageNet, on other images of the user's, on the embedded data set."""
    data = _root_.data
    if data.get("num_classes") == 1000:
        return imagenet
    if not data.get("root"):
        return embedded
    configured = os.environ.get("IMAGENET_DIR")
    same = configured and os.path.abspath(configured) == os.path.abspath(data.root)
    return imagenet if same else own


def register() -> None:
    """Tell Hydra the schemas, and OmegaConf the resolvers that conf/ uses."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    store.store(name="prepare_schema", node=PrepareConfig)
    store.store(name="report_schema", node=ReportConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="label_maps_schema", node=LabelMapsConfig)
    store.store(name="benchmark_schema", node=BenchmarkConfig)
    store.store(name="export_schema", node=ExportConfig)
    store.store(name="visualize_schema", node=VisualizeConfig)
    store.store(name="dashboard_schema", node=DashboardConfig)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("by_data", by_data, replace=True)


def overridden(overrides: list[str]) -> set[str]:
    """The names of what was given on the command line: {"keep_rate", "data.root", "model"}."""
    return {name[1] for text in overrides if (name := re.match(r"[+~]*([\w./-]+)", text))}


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_spelling(overrides: list[str], schema: type) -> None:
    """Refuse a knob that is not there: Hydra would advise to add it, and it would do nothing.

    Raises:
        ValueError: names the knob and the nearest one.
    """
    types: Any = dict(experiment=Any, hydra=Any) | {e.name: e.type for e in fields(schema)}
    for override in overrides:
        if not (knob := re.match(r"[+~]*(([\w-]+)[\w.-]*)=", override)):
            continue
        path, root = knob.groups()
        names, wrong = list(types), root
        if path != root and is_dataclass(types.get(root)):
            names, wrong = [f"{root}.{entry.name}" for entry in fields(types[root])], path
        if wrong not in names:
            near = difflib.get_close_matches(wrong, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
            raise ValueError(f"unknown knob {wrong!r} in {override!r}: {hint}")


def entry_point(
    config_name: str, schema: type
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """hydra.main over conf/, which a mistake, the disk or a signal ends with one plain message."""
    register()
    names = {entry.name for entry in fields(schema)}

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(task)
        def run(cfg: DictConfig) -> Any:
            if not gc.isenabled():  # src/startup.py
                gc.freeze()
                gc.enable()
            try:
                return task(cfg)
            except BaseException as error:
                hydra_cfg = HydraConfig.get()
                one = hydra_cfg.mode != RunMode.MULTIRUN
                ending.end_run(error, Path(hydra_cfg.runtime.output_dir), "resume" in names, one)
                raise

        main = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)

        def checked() -> Any:
            if "dry_run" in names:
                sys.argv = ["dry_run=true" if a == "--dry-run" else a for a in sys.argv]
            try:
                check_spelling(sys.argv[1:], schema)
            except ValueError as error:
                ending.fail(error)
            if "dry_run=true" not in sys.argv:
                return main(run)()
            with TemporaryDirectory() as folder:  # Hydra makes one, whatever the task does
                sys.argv += [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
                return main(run)()

        return functools.partial(ending.program, checked)

    return decorate
