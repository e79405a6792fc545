"""The run's records: metrics.jsonl, which is the truth, and W&B, which mirrors it."""

import contextlib
import json
import os
import secrets
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn


class JsonlLogger(Logger):
    """Appends each logged row to a file as one line of JSON, flushed at once.

    Whatever kills the run, what was logged before is there. `seconds` is since the logger was made.
    A run that goes on after a number of steps loses the rows that were logged later.
    """

    def __init__(self, path: Path, steps: int | None = None):
        super().__init__()
        self.path, self.start = path, time.monotonic()
        if steps is not None and path.is_file():
            rank_zero_only(self._cut)(steps)

    def _cut(self, steps: int) -> None:
        lines = self.path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < steps]
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(kept))
        partial.replace(self.path)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """The configuration is in result.json."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics, "seconds": round(time.monotonic() - self.start, 3)}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def slurm_token_hidden() -> Iterator[None]:
    """W&B records every SLURM_* that its process inherits, and one of them is a password."""
    token = os.environ.pop("SLURM_JWT", None)
    try:
        yield
    finally:
        if token is not None:
            os.environ["SLURM_JWT"] = token


@slurm_token_hidden()
def wandb_mode(mode: str) -> str:
    """auto is online where the user is logged in to W&B and offline elsewhere.

    Raises:
        ValueError: mode is not one of auto, online, offline, disabled.
    """
    if mode not in ("auto", "online", "offline", "disabled"):
        raise ValueError(f"logger.mode must be auto, online, offline or disabled, got {mode!r}")
    if mode != "auto":
        return mode
    return "online" if wandb.login(prompt=False, verify=False) else "offline"


@rank_zero_only
def start_service(mode: str) -> None:
    """Let W&B start its process while there is other work: wandb_logger would wait for it."""

    @slurm_token_hidden()
    def start() -> None:
        with contextlib.suppress(Exception):  # wandb_logger meets it again, and says so
            wandb.setup()

    if mode != "disabled":
        threading.Thread(target=start).start()


@rank_zero_only
def wandb_logger(
    directory: Path,
    *,
    name: str,
    mode: str,
    project: str,
    entity: str | None,
    group: str,
    tags: list[str],
    config: dict[str, Any],
) -> WandbLogger | None:
    """Lightning's logger of a folder's W&B run; None where disabled, or not this process's.

    The run is that of the id in wandb/run_id, so one that goes on stays the same. A failure to
    reach W&B is not the run's: it is said, and the run goes on offline.
    """
    if mode == "disabled":
        return None

    run_id = directory / "wandb" / "run_id"
    if not run_id.is_file():
        run_id.parent.mkdir(parents=True, exist_ok=True)
        run_id.write_text(secrets.token_hex(4))

    @slurm_token_hidden()
    def start(mode: Any) -> wandb.Run:
        return wandb.init(
            id=run_id.read_text(),
            resume="allow",
            project=project,
            entity=entity,
            group=group,
            job_type="train",
            name=name,
            tags=tags,
            config=config,
            dir=str(directory),
            mode=mode,
            reinit="finish_previous",
            # Online it prints the address of the run.
            settings=wandb.Settings(silent=mode == "offline"),
        )

    try:
        run = start(mode)
    except (wandb.errors.Error, OSError) as error:
        rank_zero_warn(f"W&B cannot be reached ({error}): the run is tracked offline, make sync")
        run = start("offline")
    return WandbLogger(experiment=run)


def log_summary(run: wandb.Run, summary: dict[str, Any]) -> None:
    """The numbers that runs are compared by, as the W&B run's summary and as a table of one row.

    W&B shows the tables of a group's runs as one.
    """
    run.summary.update(summary)
    row = [str(value) if isinstance(value, list) else value for value in summary.values()]
    run.log({"result": wandb.Table(columns=list(summary), data=[row])})
