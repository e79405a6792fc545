"""MATLAB's files, version 5 to 7, as far as ImageNet's meta.mat goes.

scipy reads all of them; but where it is installed, torchmetrics imports half of it into every
command. The format: MathWorks, "MAT-File Format", chapter 1.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

MATRIX, COMPRESSED, UTF8 = 14, 15, 16  # types of elements; the others are numbers, and UTF-16, -32
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8"}
NUMBERS |= {13: "u8", 17: "u2", 18: "u4"}
STRUCT, CHAR, NUMERIC = 2, 4, range(6, 16)  # classes of arrays


def read_matlab(data: bytes) -> dict[str, Any]:
    """The variables: numbers as flat arrays, texts, struct arrays as lists of dicts, else None.

    Raises:
        ValueError, KeyError, struct.error, zlib.error: no such file, or it is damaged.
    """
    if data[126:128] not in (b"IM", b"MI"):
        raise ValueError("not a MATLAB file of version 5 to 7")
    order = "<" if data[126:128] == b"IM" else ">"
    variables = {}
    for kind, content in elements(data[128:], order):
        if kind == COMPRESSED:
            ((kind, content),) = elements(zlib.decompress(content), order)
        if kind == MATRIX:
            name, variables[name] = read_array(content, order)
    return variables


def elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """The type and the bytes of one after the other; order is struct's sign of the byte order."""
    start = 0
    while start < len(data):
        kind, size = struct.unpack_from(f"{order}2I", data, start)
        start += 8
        if small := kind >> 16:  # its bytes are where others have their size
            yield kind & 0xFFFF, data[start - 4 : start - 4 + small]
            continue
        if start + size > len(data):
            raise ValueError("it ends too early")
        yield kind, data[start : start + size]
        start += size if kind == COMPRESSED else -(-size // 8) * 8


def read_array(data: bytes, order: str) -> tuple[str, Any]:
    """The name of an array and its value."""
    if not data:
        return "", np.empty(0)
    (_, flags), (_, _shape), (_, name), *parts = elements(data, order)
    kind = struct.unpack_from(f"{order}I", flags)[0] & 0xFF
    value: Any = None
    if kind == STRUCT:
        (_, width), (_, keys), *fields = parts
        size = struct.unpack(f"{order}i", width)[0]
        names = [key.rstrip(b"\0").decode() for (key,) in struct.iter_unpack(f"{size}s", keys)]
        values = [read_array(field, order)[1] for _, field in fields]
        rows = range(0, len(values), len(names) or 1)
        value = [dict(zip(names, values[row : row + len(names)], strict=True)) for row in rows]
    elif kind == CHAR or kind in NUMERIC:
        stored, content = parts[0]  # and not the imaginary part
        if stored == UTF8:
            value = content.decode(errors="replace")
        else:
            numbers = np.frombuffer(content, order + NUMBERS[stored])
            value = "".join(map(chr, numbers)) if kind == CHAR else numbers
    return name.decode(), value
