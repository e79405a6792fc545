"""Processes that train as one: when one of them ends, so do the others, and it is said once."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import lightning as L
import torch

PARENT = "EVIT_PARENT"  # in the environment: the process that has started others of its run
GRACE = 15.0  # seconds in which a process whose peer has ended should notice, and end by itself

# What gloo, PyTorch's store and NCCL say of a process that has ended.
CLOSED = ("by peer", "Broken pipe", "Socket closed", "failed to recv", "remote process exited")


class Watch(threading.Thread):
    """Ends this process after another of its run: it may wait for that one for ever.

    Args:
        ended: says which has ended and how, if one has.
        children: processes that end with this one.
        says: whether it is for this process to say so.
    """

    def __init__(
        self,
        ended: Callable[[], str | None],
        children: list[subprocess.Popen],
        says: bool,
    ):
        super().__init__(daemon=True)
        self.ended, self.children, self.says = ended, children, says
        self.noticed = False  # by the process itself, or it waits for no other any more
        self.start()

    def run(self) -> None:
        while not (text := self.ended()):
            time.sleep(0.5)
        time.sleep(GRACE)
        if self.noticed:
            return
        self.kill_children()
        if self.says:
            print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(2)

    def kill_children(self) -> None:
        for child in self.children:
            child.kill()


watch: Watch | None = None  # where Lightning starts the processes


def watch_children(children: list[subprocess.Popen]) -> None:
    """Where Lightning would kill this process without a word."""

    def ended() -> str | None:
        for number, child in enumerate(children, 1):
            if status := child.poll():
                how = f"exit status {status}"
                if status < 0:
                    how = signal.Signals(-status).name
                return f"process {number} has ended ({how}), and so do the others"
        return None

    global watch
    watch = Watch(ended, children, says=True)


def watch_parent() -> None:
    """In a process that Lightning has started, watch the one that has; in others do nothing."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank == 0:
        os.environ[PARENT] = str(os.getpid())
    elif PARENT in os.environ and not torch.distributed.is_torchelastic_launched():
        parent = int(os.environ[PARENT])

        def ended() -> str | None:
            return None if os.getppid() == parent else "process 0 has ended, and so do the others"

        global watch
        watch = watch or Watch(ended, [], says=rank == 1)


def done() -> None:
    """After the last that the processes do together: from here on each may end as it will."""
    if watch:
        watch.noticed = True


def end(trainer: L.Trainer, error: BaseException) -> None:
    """What a process does that an error ends: it takes those with it that it has started.

    Raises:
        ChildProcessError: there is no more to the error than that another process has ended.
        SystemExit: another process says why.
    """
    if trainer.world_size == 1:
        return
    lost = of_another(error)
    text = None
    until = time.monotonic() + 5
    while lost and watch and not (text := watch.ended()) and time.monotonic() < until:
        time.sleep(0.1)
    if watch:
        watch.noticed = True
        watch.kill_children()
    if lost and (trainer.is_global_zero or text and watch and watch.says):
        reason = str(error).partition("\n")[0]
        raise ChildProcessError(text or f"the other processes are lost: {reason}") from None
    if lost:
        sys.exit(2)
    if isinstance(error, FloatingPointError) and not trainer.is_global_zero:
        time.sleep(60)  # process 0 has the same error, and ends this one when it has said so
        sys.exit(2)


def of_another(error: BaseException) -> bool:
    """Whether an error is of a connection that a process at its other end has closed."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in CLOSED)
