"""How a program ends before it has finished: with one line that says why."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra.errors import CompactHydraException, InstantiationException

from evit import disk, signals


def program(main: Callable[[], Any]) -> Any:
    """Call it; a signal, a full disk or what Hydra refuses ends the program with one plain line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or it ends the program itself
    try:
        # SIGUSR1 too: Lightning's handler under SLURM, which saves in each process at another step,
        # stays out where there is one.
        with signals.stopping(*signals.ENDING):
            return main()
    except signals.Stopped as stopped:
        end(stopped)
    except CompactHydraException as error:
        fail(" ".join(" ".join(str(e) for e in (error, error.__cause__) if e).split()))
    except OSError as error:  # of the run's folder
        if text := disk.refused(error, Path()):
            fail(text)
        raise


def end_run(error: BaseException, folder: Path, resumes: bool, one: bool) -> None:
    """End the program where a run has ended by a signal, a full disk or a user's mistake.

    Args:
        folder: the run's, removed if it is empty.
        resumes: whether the same command goes on.
        one: it is the only run, and not one of a Hydra multirun: others stop with it.
    """
    if signals.received:  # whatever else has come of it
        remove_empty(folder)
        if resumes and signals.received.number == signal.SIGUSR1:
            requeue()
        end(signals.received, ": the same command goes on" if resumes else "")
    if one and (mistake := disk.refused(error, folder) or user_error(error)):
        remove_empty(folder)
        fail(mistake)


def end(stopped: signals.Stopped, advice: str = "") -> NoReturn:
    """End the program as a signal has asked, with one line for all processes of a machine."""
    with suppress(OSError):  # there may be no terminal any more
        if first_of_machine():
            print(f"{stopped}{advice}", file=sys.stderr, flush=True)
    sys.exit(128 + stopped.number)


def requeue() -> None:
    """Let SLURM begin the job anew, once for all processes: for sbatch's --signal=USR1@90."""
    if os.environ.get("SLURM_PROCID") == "0" and first_of_machine():
        with suppress(OSError):  # there is no scontrol in some containers
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])


def first_of_machine() -> bool:
    """Whether this is the only process of a run on this machine, or the first."""
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID", "0")
    return rank == "0"


def fail(error: BaseException | str) -> NoReturn:
    """End the program with a user's mistake."""
    shown = "".join(c if c.isprintable() or c == "\n" else "?" for c in str(error))
    print(f"error: {shown}", file=sys.stderr)
    sys.exit(2)


def user_error(error: BaseException | None) -> BaseException | None:
    """The user's mistake behind an exception, if it is one: Hydra wraps what constructors raise."""
    kinds: tuple[type[Exception], ...] = (ValueError, FloatingPointError, ChildProcessError)
    while isinstance(error, InstantiationException):
        error, kinds = error.__cause__, (ValueError, TypeError)
    return error if isinstance(error, kinds) else None


def remove_empty(folder: Path) -> None:
    """Remove the run folder that Hydra made in this one, and its parents, as far as empty."""
    with suppress(OSError):  # the disk has been told; or another process removes them
        for path in (folder, *folder.parents):
            if Path.cwd() not in path.parents or any(path.iterdir()):
                return
            path.rmdir()
