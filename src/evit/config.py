"""The knobs: their names and types. Everything Hydra-specific that is not composing lives here."""

import functools
import hashlib
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf

from evit.training.recipe import Recipe

CONF_DIR = Path(__file__).parents[2] / "conf"


@dataclass
class RunConfig:
    """The knobs of src/train.py."""

    name: str = MISSING
    keep_rate: Any = MISSING  # a number, or one for each reorganization
    fusion: bool = MISSING
    img_size: int = MISSING
    seed: int = MISSING
    checkpoint: str | None = None
    overwrite: bool = False
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


def folder_name(overrides: str) -> str:
    """A folder name that says what was overridden: short, and without path separators."""
    name = re.sub(r"[^\w=.,+\[\]-]+", "_", overrides) or "default"
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name) <= 150 else f"{name[:140]}-{digest}"


def with_root(own: Any, embedded: Any, *, _root_: DictConfig) -> Any:
    """`own` where the user has data (data.root), `embedded` on the embedded data set."""
    return own if _root_.data.get("root") else embedded


def register() -> None:
    """Tell Hydra the schemas, and OmegaConf the resolvers that conf/ uses."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    store.store(name="prepare_schema", node=PrepareConfig)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("with_root", with_root, replace=True)


def user_error(error: BaseException | None) -> ValueError | TypeError | None:
    """The user's mistake behind an exception, if it is one: Hydra wraps what constructors raise."""
    while isinstance(error, InstantiationException):
        error = error.__cause__
    return error if isinstance(error, ValueError | TypeError) else None


def remove_empty(folder: Path) -> None:
    """Remove the run folder that Hydra made, and its parents, as far as nothing is in them."""
    for path in (folder, *folder.parents):
        if path == Path.cwd() or any(path.iterdir()):
            return
        path.rmdir()


def entry_point(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """hydra.main over conf/, where a user's mistake ends a single run with one plain message."""
    register()

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(task)
        def run(cfg: DictConfig) -> Any:
            try:
                return task(cfg)
            except (InstantiationException, ValueError) as error:
                mistake = user_error(error)
                single = HydraConfig.get().mode == RunMode.RUN
                if mistake is None or not single:
                    raise
                remove_empty(Path(HydraConfig.get().runtime.output_dir))
                print(f"error: {mistake}", file=sys.stderr)
                sys.exit(2)

        return hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(
            run
        )

    warnings.filterwarnings("ignore", module="hydra")
    return decorate
