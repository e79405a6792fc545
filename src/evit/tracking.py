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
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from evit.files import whole_file

STEP = "trainer/global_step"  # as Lightning's own logger names it
WAITS = dict(init_timeout=30, finish_timeout=30)  # seconds; WANDB_FINISH_TIMEOUT=300 for others


class JsonlLogger(DummyLogger):
    """Append each row to a file, at once; a run that resumes after `steps` drops later rows."""

    def __init__(self, path: Path, steps: int = 0):
        self.path, self.start, self.earlier = path, time.monotonic(), 0.0
        if rank_zero_only.rank or not path.is_file():  # type: ignore[attr-defined]
            return
        *lines, _ = path.read_text().split("\n")  # the last one is empty, or cut
        rows = [json.loads(line) for line in lines]
        self.earlier = rows[-1]["seconds"] if rows else 0.0
        kept = [f"{line}\n" for line, row in zip(lines, rows, strict=True) if row["step"] < steps]
        with whole_file(path) as file:
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
    with suppress(wandb.errors.Error):  # an invalid key: reported when tracking begins
        if mode == "auto" and not wandb.login(prompt=False, verify=False):
            return "offline"
    return "online" if mode == "auto" else mode


class Tracker(DummyLogger):
    """Copy a run, begun by `start`, to W&B; if W&B fails, print a line and go on without it."""

    def __init__(self, start: Callable[[], wandb.Run], run_id: str):
        self.run_id, self.run, self.over = run_id, None, False
        self.attempt(lambda _: setattr(self, "run", start()))

    def attempt(self, step: Callable[[Any], Any], last: bool = False) -> None:
        """Call step(run), unless W&B is over: it is after a failure, or the last step."""
        if self.over:
            return
        try:
            step(self.run)
        except Exception as error:  # W&B raises many types
            reason, last = f"{type(error).__name__}: {error}".partition("\n")[0], True
            where = "the run goes on untracked; metrics.jsonl and result.json have all of it"
            if run := self.run:
                where += f", and `wandb sync {run.settings.sync_dir}` uploads what W&B has"
                with suppress(Exception):
                    run.finish(1)
            print(f"W&B has failed ({reason}): {where}", flush=True)
        if last:
            self.over = True
            with suppress(Exception, SystemExit):
                wandb.teardown()

    def end(self, exit_code: int = 0) -> None:
        self.attempt(lambda run: run.finish(exit_code), last=True)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.attempt(lambda run: run.log({**metrics, STEP: step}))

    def log_image(self, key: str, image: Image.Image, step: int) -> None:
        self.attempt(lambda run: run.log({key: [wandb.Image(image, file_type="jpg")], STEP: step}))

    def log_summary(self, summary: dict[str, Any]) -> None:
        """Log the compared metrics as the run's summary and as a table of one row."""
        row = [str(value) if isinstance(value, list) else value for value in summary.values()]
        self.attempt(lambda run: run.log({"result": wandb.Table(list(summary), [row])}))
        self.attempt(lambda run: run.summary.update(summary))


@rank_zero_only
def wandb_logger(directory: Path, *, mode: str, **options: Any) -> Any:
    """Create the Tracker of a run's folder, with wandb.init's options; None if it is disabled."""
    if mode == "disabled":
        return None
    logging.raiseExceptions = False  # or W&B's own log prints tracebacks where a disk is full
    path = directory / "wandb" / "run_id"
    run_id = path.read_text() if path.is_file() else secrets.token_hex(4)
    waits: Any = {k: v for k, v in WAITS.items() if f"WANDB_{k.upper()}" not in os.environ}
    waits |= dict(silent=mode == "offline", finish_timeout_raises=True)  # online: says its address
    options |= dict(id=run_id, dir=str(directory), mode=mode, resume="allow")
    options |= dict(job_type="train", reinit="finish_previous")

    def start() -> wandb.Run:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id)
        run = wandb.init(settings=wandb.Settings(**waits), **options)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        return run

    return Tracker(start, run_id)
