"""Progress of what takes long: images/s and the time left."""

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
LINE_SECONDS = 30.0


def shown(
    items: Iterable[T], total: int, description: str, enabled: bool = True, done: int = 0
) -> Iterator[T]:
    """The items, one for each image of which `done` are there already.

    They move a bar in a terminal; elsewhere a line tells every half minute, and at the end.
    """
    if not enabled:
        yield from items
    elif Console().is_terminal:
        yield from _bar(items, total, description, done)
    else:
        yield from _lines(items, total, description, done)


def _bar(items: Iterable[T], total: int, description: str, done: int) -> Iterator[T]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total, completed=done, rate="-")
        for item in items:
            yield item
            speed = bar.tasks[task].speed
            bar.update(task, advance=1, rate=f"{speed:.0f}" if speed else "-")


def _lines(items: Iterable[T], total: int, description: str, done: int) -> Iterator[T]:
    start = last = time.monotonic()
    count = done
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if count == total or now - last >= LINE_SECONDS:
            last, rate = now, (count - done) / max(now - start, 1e-9)
            left = timedelta(seconds=round((total - count) / rate))
            print(f"{description}: {count}/{total}, {rate:.0f} images/s, {left} left", flush=True)
