"""A file under way: it has one writer at a time, and where that one is stopped the next goes on.

Beside the file to be are `.NAME.partial`, its data so far, and `.NAME.journal`, JSON lines that
say what is in there: the first tells what is being written, each other one is [key of the sample,
*record of it]. A line is written when its data are on the disk, and not before: whatever the
journal lists is there, wherever the writer was stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from evit.data.beton import sidecar_path
from evit.data.encode import Skipped, Stored
from evit.files import sync_folder

COMMIT_BYTES = 2**28  # data that may have to be written again


class Partial:
    """The data and the journal of a file under way.

    Attributes:
        data: the file that becomes `path`, open for writing.
        count: samples in it.
    """

    def __init__(self, path: Path, journal: BinaryIO):
        self.path, self.journal = path, journal
        self.data_path = _beside(path, "partial")
        self.data = open(self.data_path, "r+b" if self.data_path.exists() else "w+b")
        self.keys: Sequence[int] | np.ndarray = ()
        self.count = 0
        self._lines: list[bytes] = []
        self._uncommitted = 0

    def recover(
        self, head: dict[str, Any], keys: Sequence[int] | np.ndarray, keep_skipped: bool
    ) -> Iterator[Stored | Skipped]:
        """The records of an earlier writer, up to the first that does not hold; cut off the rest.

        Args:
            head: what is written, and how. None hold where it is not the same.
            keys: of all samples. A record of a sample with another key does not hold.
            keep_skipped: whether the record of a sample that was left out does.
        """
        self.keys = keys
        size = self.data.seek(0, os.SEEK_END)
        first = json.dumps(head).encode() + b"\n"
        good = end = 0
        self.journal.seek(0)
        if self.journal.readline() == first:
            good = len(first)
            for line, key in zip(self.journal, keys, strict=False):
                record = _parse(line, key)
                if isinstance(record, Stored):
                    if record.end > size:
                        break
                    end = record.end
                elif record is None or not keep_skipped:
                    break
                good += len(line)
                self.count += 1
                yield record
        else:
            self._lines.append(first)
        self.journal.truncate(good)
        self.data.truncate(end)

    def add(self, record: Stored | Skipped, pieces: Sequence[bytes] = ()) -> None:
        if isinstance(record, Stored):
            for start, piece in zip(record.starts, pieces, strict=True):
                self.data.seek(start)
                self.data.write(piece)
                self._uncommitted += len(piece)
        self._lines.append(json.dumps([int(self.keys[self.count]), *record]).encode() + b"\n")
        self.count += 1
        if self._uncommitted >= COMMIT_BYTES:
            _sync(self.data)
            self.journal.write(b"".join(self._lines))
            _sync(self.journal)
            self._lines, self._uncommitted = [], 0

    def finish(self, sidecar: bytes) -> None:
        """Put the file and its sidecar where they belong.

        Between the two renames the pair does not match, which check_beton refuses.
        """
        _sync(self.data)
        path = sidecar_path(self.path)
        with open(_beside(path, "partial"), "wb") as file:
            file.write(sidecar)
            _sync(file)
        os.replace(file.name, path)
        os.replace(self.data_path, self.path)
        sync_folder(self.path.parent)

    def remove(self) -> None:
        for path in self.data_path, _beside(sidecar_path(self.path), "partial"):
            path.unlink(missing_ok=True)
        Path(self.journal.name).unlink()  # last, since it is the lock


@contextmanager
def only_writer(path: Path) -> Iterator[Partial]:
    """The file under way to `path`, once no other process, on any machine, writes it.

    Without an error it is finished, or not needed, and removed. After one it stays if anything is
    in its journal.
    """
    with _lock(path) as journal:
        partial = Partial(path, journal)
        try:
            yield partial
        except BaseException:
            if os.fstat(journal.fileno()).st_size:
                print(
                    f"What is written of {path} is kept: the same command goes on from there",
                    file=sys.stderr,
                )
            else:
                partial.remove()
            raise
        else:
            partial.remove()
        finally:
            with suppress(OSError):  # a full disk has been told
                partial.data.close()


def _lock(path: Path) -> BinaryIO:
    name = _beside(path, "journal")
    while True:
        file = open(name, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process writes {path}: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"{path.parent} is on a file system without locks ({error}), where two processes "
                f"could write one file: choose another folder"
            ) from error
        # Who had it has removed it, if all went well; and another may have made a new one.
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                return file
        except FileNotFoundError:
            pass
        file.close()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _parse(line: bytes, key: int) -> Stored | Skipped | None:
    """A line of the journal, unless it is torn or of another sample."""
    try:
        found, *record = json.loads(line)
    except ValueError:
        return None
    if found != key or not line.endswith(b"\n"):
        return None
    return Stored(*record) if len(record) == len(Stored._fields) else Skipped(*record)
