"""Images in tar archives, read where they are: nothing is unpacked."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class TarMember(NamedTuple):
    """A file in an uncompressed tar archive, perhaps in a tar that is a member of it."""

    archive: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.archive, "rb") as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise OSError(f"{self.archive} ends within it")
        return data

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


def tar_members(path: Path) -> Iterator[TarMember]:
    """The files of an archive; those of a tar in it, CLASS.tar, are named CLASS/FILE.

    Raises:
        ValueError: it is no uncompressed tar, or cut off, or names a file outside of itself.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if not member.name.endswith(".tar"):
                    yield _inside(
                        TarMember(str(path), member.name, member.offset_data, member.size)
                    )
                    continue
                folder = member.name.removesuffix(".tar")
                with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                    for file in inner:
                        if file.isfile():
                            start = member.offset_data + file.offset_data
                            name = f"{folder}/{file.name}"
                            yield _inside(TarMember(str(path), name, start, file.size))
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a whole, uncompressed tar archive ({error}): download it again"
        ) from error


def _inside(member: TarMember) -> TarMember:
    """A member whose name, where it becomes a path, leads nowhere else."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{member.archive} holds {member.name!r}, outside of it: do not trust it")
    return member
