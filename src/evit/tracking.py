"""Logging of a run: metrics.jsonl, the record, and W&B, a copy."""

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from evit.files import whole_file

STEP = "trainer/global_step"  # as Lightning's own logger names it
WAITS = dict(init_timeout=30, finish_timeout=30)  # seconds; WANDB_FINISH_TIMEOUT=300 for others


class OwnLogger(Logger):
    name, version = "", ""  # type: ignore[assignment]

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The configuration is kept elsewhere."""


class JsonlLogger(OwnLogger):
    """Append each logged row to a file as one line of JSON, flushed at once.

    Rows survive any kill. A run that resumes after a number of steps drops the rows of later
    steps. `seconds` covers all parts of the run.
    """

    def __init__(self, path: Path, steps: int | None = None):
        super().__init__()
        self.path, self.start, self.earlier = path, time.monotonic(), 0.0
        if steps is not None and path.is_file():
            self.cut(steps)

    @rank_zero_only
    def cut(self, steps: int) -> None:
        *lines, _ = self.path.read_text().split("\n")  # the last one is empty, or cut
        rows = [json.loads(line) for line in lines]
        self.earlier = rows[-1]["seconds"] if rows else 0.0
        kept = [f"{line}\n" for line, row in zip(lines, rows, strict=True) if row["step"] < steps]
        with whole_file(self.path) as file:
            file.write("".join(kept).encode())

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        known = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
        seconds = self.earlier + time.monotonic() - self.start
        with self.path.open("a") as file:
            file.write(json.dumps(dict(step=step, **known, seconds=round(seconds, 3))) + "\n")


def wandb_mode(mode: str) -> str:
    """Resolve mode=auto: online if the user is logged in to W&B, otherwise offline."""
    if mode not in ("auto", "online", "offline", "disabled"):
        raise ValueError(f"logger.mode must be auto, online, offline or disabled, got {mode!r}")
    os.environ.pop("SLURM_JWT", None)  # a password: W&B records every SLURM_* that it inherits
    if mode != "auto":
        return mode
    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.errors.Error:  # an invalid key: reported when tracking begins
        return "online"


class Tracker(OwnLogger):
    """Copy a run, begun by `start`, to W&B; if W&B fails, print a line and go on without it."""

    def __init__(self, start: Callable[[], wandb.Run], run_id: str):
        super().__init__()
        self.version = run_id  # type: ignore[misc]
        self.run: wandb.Run | None = None
        self.attempt(lambda _: setattr(self, "run", start()))

    def attempt(self, step: Callable[[Any], Any], last: bool = False) -> None:
        """Call step(run); if it fails or is the last, end W&B's run and process."""
        run = self.run
        try:
            step(run)
        except Exception as error:  # W&B raises many types
            reason, last = f"{type(error).__name__}: {error}".partition("\n")[0], True
            where = "the run goes on untracked; metrics.jsonl and result.json have all of it"
            if run:
                where += f", and `wandb sync {run.settings.sync_dir}` uploads what W&B has"
                with suppress(Exception):
                    run.finish(1)
            print(f"W&B has failed ({reason}): {where}", flush=True)
        if last:
            self.run = None
            with suppress(Exception, SystemExit):
                wandb.teardown()

    def end(self, exit_code: int = 0) -> None:
        """End W&B's run, and its process."""
        if self.run:
            self.attempt(lambda run: run.finish(exit_code), last=True)

    def log(self, content: Callable[[], dict[str, Any]]) -> None:
        if self.run:
            self.attempt(lambda run: run.log(content()))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.log(lambda: {**metrics, STEP: step})

    def log_image(self, key: str, image: Image.Image, step: int) -> None:
        self.log(lambda: {key: [wandb.Image(image, file_type="jpg")], STEP: step})

    def log_summary(self, summary: dict[str, Any]) -> None:
        """Log the compared metrics as the run's summary and as a table of one row."""
        row = [str(value) if isinstance(value, list) else value for value in summary.values()]
        self.log(lambda: {"result": wandb.Table(columns=list(summary), data=[row])})
        if self.run:
            self.attempt(lambda run: run.summary.update(summary))


@rank_zero_only
def wandb_logger(directory: Path, *, mode: str, config: dict[str, Any], **options: Any) -> Any:
    """Create the Tracker of a run's folder; None if disabled, or not in the first process.

    The id of the W&B run is kept in wandb/run_id, so a resumed run stays the same run. options are
    wandb.init's: name, project, entity, group, tags.
    """
    if mode == "disabled":
        return None
    logging.raiseExceptions = False  # or W&B's own log prints tracebacks where a disk is full
    path = directory / "wandb" / "run_id"
    run_id = path.read_text() if path.is_file() else secrets.token_hex(4)
    waits: Any = {k: v for k, v in WAITS.items() if f"WANDB_{k.upper()}" not in os.environ}
    # Online it prints the address of the run.
    waits |= dict(silent=mode == "offline", finish_timeout_raises=True)

    def start() -> wandb.Run:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id)
        own: Any = dict(id=run_id, resume="allow", job_type="train", reinit="finish_previous")
        own |= dict(config=config, dir=str(directory), mode=mode)
        run = wandb.init(**own, **options, settings=wandb.Settings(**waits))
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        return run

    return Tracker(start, run_id)
