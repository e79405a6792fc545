"""Lines that say where a long work is."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import track

T = TypeVar("T")


@contextmanager
def telling(text: Callable[[], str], every: float = 30) -> Iterator[None]:
    """Print where a long work is, if there is something to say: after 8 s, and then every 30 s."""
    ended = threading.Event()

    def tell() -> None:
        wait = min(8, every)
        while not ended.wait(wait):
            if said := text():
                print(f"  {said}", flush=True)
            wait = every

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def followed(items: Iterable[T], text: str, total: int) -> Iterator[T]:
    """Go through items with a bar on a terminal, and with lines elsewhere."""
    items, done = iter(items), 0  # workers are forked before there is a thread
    if sys.stdout.isatty():
        yield from track(items, text, total)
        return
    with telling(lambda: f"{text}: {done} of {total} batches"):
        for item in items:
            yield item
            done += 1
