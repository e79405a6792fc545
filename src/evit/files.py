"""Files that are whole or not there, and what a disk refuses."""

import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    """A file that takes the place of `path` when all of it is on the disk.

    After an error, or a signal, it is removed, and `path` is as it was.
    """
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
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names of a folder on the disk: a rename before this outlives a power failure."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # a network's file system may have no such thing
        os.fsync(number)
    os.close(number)


def refused(error: BaseException, folder: Path) -> str | None:
    """What to tell the user where a disk is full or may not be used; None: it is not that.

    Args:
        folder: where the program writes, for an error that names no file.
    """
    if not isinstance(error, OSError) or errno.errorcode.get(error.errno or 0) not in REFUSED:
        return None
    path, reason = os.path.relpath(error.filename or folder), os.strerror(error.errno or 0)
    return f"{path} cannot be used: {reason}. Make room or choose another folder"


def check_zip(path: Path) -> None:
    """Compare a zip file, such as torch.save's, with its checksums: torch.load does not."""
    if not zipfile.is_zipfile(path):
        return  # left to its reader
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except Exception as error:  # of zlib, struct or zipfile: whichever byte has changed
        raise ValueError(f"damaged: {error}") from error
    if changed:
        raise ValueError(f"damaged: {changed} is not as it was written")
