"""The run's records: metrics.jsonl, which is the truth, and W&B, which mirrors it."""

import json
import logging
import math
import os
import secrets
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from PIL import Image

from evit.disk import whole_file

STEP = "trainer/global_step"  # as Lightning's own logger names it
WAITS = dict(init_timeout=30, finish_timeout=30)  # seconds; WANDB_FINISH_TIMEOUT=300 for others


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
        with whole_file(self.path) as file:
            file.write("".join(kept).encode())

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
        known = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
        row = {"step": step, **known, "seconds": round(time.monotonic() - self.start, 3)}
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
    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.errors.Error:  # of the key: said where the run is to be tracked
        return "online"


class Tracker(Logger):
    """Mirrors a run in W&B, whose failures are not the run's: it goes on offline, or untracked.

    Args:
        start: begins W&B's run in a mode.
        run_id: of that run.
        mode: the first that is tried.
    """

    def __init__(self, start: Callable[[str], wandb.Run], run_id: str, mode: str):
        super().__init__()
        self.start, self.run_id = start, run_id
        self.modes = [mode, "offline", "offline"]  # those left
        self.run: wandb.Run | None = None
        self.attempt(lambda _: None)

    def attempt(self, step: Callable[[wandb.Run], Any]) -> None:
        """Do a step with W&B's run; where that fails, with one in the next mode, and say so."""
        failure = None
        while self.run or self.modes:
            try:
                self.run = self.run or self.start(self.modes.pop(0))
                step(self.run)
                break
            except Exception as error:  # of many types, in W&B
                failure = failure or error
                self.end(1)
        if failure:
            where = "the run is tracked offline from here, make sync uploads it"
            if not self.run:
                where = "the run is not tracked, but metrics.jsonl and result.json have all of it"
            what = f"{type(failure).__name__}: {failure}".partition("\n")[0]
            text = f"W&B has failed ({what}): {where}"
            rank_zero_warn(text)

    def end(self, exit_code: int = 0) -> None:
        """End W&B's run and its process; what is not taken in finish_timeout is for make sync."""
        run, self.run = self.run, None
        late = False
        try:
            if run:
                run.finish(exit_code)
        except TimeoutError:
            late = True
        except Exception:  # the process has ended
            pass
        with suppress(Exception, SystemExit):
            wandb.teardown()
        if run and late:
            directory = Path(run.settings.sync_dir)
            directory.rename(directory.with_name(f"offline-{directory.name}"))
            rank_zero_warn("W&B has not taken all of the run: make sync uploads it")

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self.run_id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """The configuration is given at the start."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.attempt(lambda run: run.log({**metrics, STEP: step}))

    def log_image(self, key: str, image: Image.Image, step: int) -> None:
        self.attempt(lambda run: run.log({key: [wandb.Image(image, file_type="jpg")], STEP: step}))

    def log_summary(self, summary: dict[str, Any]) -> None:
        """The numbers that runs are compared by, as the run's summary and as a table of one row.

        W&B shows the tables of a group's runs as one.
        """
        row = [str(value) if isinstance(value, list) else value for value in summary.values()]

        def log(run: wandb.Run) -> None:
            run.summary.update(summary)
            run.log({"result": wandb.Table(columns=list(summary), data=[row])})

        self.attempt(log)


@rank_zero_only
def start_service(mode: str) -> None:
    """Let W&B start its process while there is other work: wandb_logger would wait for it."""

    @slurm_token_hidden()
    def start() -> None:
        with suppress(Exception):  # wandb_logger meets it again, and says so
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
) -> Tracker | None:
    """Of a folder's W&B run; None where disabled, or not this process's.

    The run is that of the id in wandb/run_id, so one that goes on stays the same.
    """
    if mode == "disabled":
        return None

    logging.raiseExceptions = False  # or W&B's own log prints tracebacks where a disk is full
    path = directory / "wandb" / "run_id"
    known = path.read_text() if path.is_file() else ""
    run_id = known or secrets.token_hex(4)
    waits: Any = {k: v for k, v in WAITS.items() if f"WANDB_{k.upper()}" not in os.environ}

    @slurm_token_hidden()
    def start(mode: Any) -> wandb.Run:
        if not known:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(run_id)
        run = wandb.init(
            id=run_id,
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
            settings=wandb.Settings(
                silent=mode == "offline",  # online it prints the address of the run
                finish_timeout_raises=True,
                **waits,
            ),
        )
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        return run

    return Tracker(start, run_id, mode)
