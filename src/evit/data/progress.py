"""Progress of long work on images: a bar on a terminal, a line every 30 s elsewhere."""

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")
LINE_SECONDS = 30.0


def shown(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Iterate over `total` images, showing how many are done and the time left."""
    if Console().is_terminal:
        yield from track(items, f"{description} ({total} images)", total=total)
        return
    start = last = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if count == total or now - last >= LINE_SECONDS:
            last, rate = now, count / max(now - start, 1e-9)
            left = timedelta(seconds=round((total - count) / rate))
            print(f"{description}: {count}/{total}, {rate:.0f} images/s, {left} left", flush=True)
