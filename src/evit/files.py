"""Write files atomically, explain errors of the disk, print how far a long task has come."""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

REFUSED = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOTDIR EEXIST EISDIR EIO ESTALE".split()


def printable(value: Any) -> Any:
    """Text, or JSON, without what a terminal or an SVG would take for more than letters."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "?" for c in value)
    if isinstance(value, list):
        return [printable(entry) for entry in value]
    if isinstance(value, dict):
        return {printable(key): printable(entry) for key, entry in value.items()}
    return value


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when all of it is on the disk; an error removes it."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            error.filename = path
        raise


def refused(error: BaseException, folder: Path) -> str | None:
    """Message for the user if a disk (folder, if no file is named) cannot be used; else None."""
    if not isinstance(error, OSError) or errno.errorcode.get(error.errno or 0) not in REFUSED:
        return None
    path, reason = os.path.relpath(error.filename or folder), os.strerror(error.errno or 0)
    return f"{path} cannot be used: {reason}. Make room or choose another folder"


@contextmanager
def telling(text: Callable[[], str], every: float = 30) -> Iterator[None]:
    """Print text(), how far a task has come, after 8 s and then every 30 s; an empty one is not."""
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


def followed(items: Iterable[Any], text: str, total: int) -> Iterator[Any]:
    """Yield items, and print now and then how many of them are done."""
    items, done = iter(items), 0  # workers are forked before there is a thread
    with telling(lambda: f"{text}: {done} of {total} batches"):
        for item in items:
            yield item
            done += 1
