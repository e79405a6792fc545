"""Signals that end a program as it should: with one line that says so, and status 128 + n."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal asks the program to end."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


received: Stopped | None = None  # the first
_pid = 0


@contextmanager
def stopping(*numbers: int) -> Iterator[None]:
    """Within this, the first of these signals raises Stopped, wherever the program is.

    Further ones do nothing: torchrun, srun and terminals send them twice. Those that were ignored
    before, as nohup does, still are.
    """
    global received, _pid
    received, _pid = None, os.getpid()
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: now for number, now in before.items() if now != signal.SIG_IGN}
    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def on_signal(number: int, _: Any) -> None:
    global received
    if os.getpid() != _pid:  # a worker that was forked, which its parent ends
        if number == signal.SIGTERM:
            os._exit(128 + number)
    elif received is None:
        received = Stopped(number)
        raise received


def check() -> None:
    """Raise Stopped once more, where a destructor has swallowed it.

    Raises:
        Stopped: a signal was received.
    """
    if received:
        raise received
