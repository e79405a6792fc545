"""The .beton file format of FFCV 1.0, and the sidecar that proves a file whole.

    header | fields | metadata of every sample | data | CRC32 of every sample | allocation table

FFCV finds the allocation table through the header and reads it to the end of the file; the CRC32s
before it are ours and invisible to FFCV. `train.beton.json`, the sidecar, describes the data set
and holds one CRC32 of everything except the data.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

BETON_VERSION = 2
SIDECAR_FORMAT = "evit-beton-1"
MIN_PAGE_SIZE = 2**21
JPEG, RAW = 0, 1

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
CRC = np.dtype("<u4")

FIELDS = np.zeros(2, FIELD)
FIELDS["type_id"] = 2, 1  # FFCV's RGBImageField and IntField
FIELDS["name"] = b"image", b"label"
METADATA_START = HEADER.itemsize + FIELDS.nbytes


class BetonError(ValueError):
    """A .beton file, or its sidecar, that must not be read."""

    def __init__(
        self, path: Path, reason: str, way_out: str = "delete it and prepare the data again"
    ) -> None:
        super().__init__(f"{path}: {reason}; {way_out}")


def sidecar_path(path: str | Path) -> Path:
    """train.beton -> train.beton.json"""
    return Path(f"{path}.json")


def index_crc32(
    header: np.ndarray, metadata: np.ndarray, crcs: np.ndarray, allocations: np.ndarray
) -> int:
    """CRC32 of everything in the file except the samples' data."""
    crc = 0
    for part in (header, FIELDS, metadata, crcs, allocations):
        crc = zlib.crc32(part.tobytes(), crc)
    return crc


def check_beton(path: str | Path, deep: bool = False) -> dict[str, Any]:
    """Verify a file, on which FFCV could crash or lie, and return its sidecar.

    Costs milliseconds, a tenth of a second for ImageNet. `deep` reads the whole file and compares
    the CRC32 of every sample; without it, a damaged JPEG shows when it is read, damaged raw pixels
    never. Raises BetonError, which says what is wrong and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise BetonError(path, "no such file", "prepare the data first")
    if not path.is_file():
        raise BetonError(path, "not a regular file")

    size = path.stat().st_size
    if size < METADATA_START:
        raise BetonError(path, f"{size} bytes, too short for a .beton header")
    content = np.memmap(path, np.uint8, "r")
    header = content[: HEADER.itemsize].view(HEADER)
    num_samples, table = _check_header(path, size, header[0])
    if content[HEADER.itemsize : METADATA_START].tobytes() != FIELDS.tobytes():
        raise BetonError(path, "its fields are not exactly image and label")

    crc_start = table - num_samples * CRC.itemsize
    metadata_end = METADATA_START + num_samples * METADATA.itemsize
    if metadata_end > crc_start:
        raise BetonError(path, f"bad header: no room for {num_samples} samples")
    metadata = content[METADATA_START:metadata_end].view(METADATA)
    allocations = content[table:].view(ALLOCATION)
    crcs = content[crc_start:table].view(CRC)
    _check_samples(path, metadata, allocations, metadata_end, crc_start)

    sidecar = _read_sidecar(path)
    for key, found in ("bytes", size), ("num_samples", num_samples):
        if sidecar[key] != found:
            message = f"its sidecar was written for another file: {key} {sidecar[key]}, not {found}"
            raise BetonError(path, message)
    labels, num_classes = metadata["label"], sidecar["num_classes"]
    if labels.min() < 0 or labels.max() >= num_classes:
        found_labels = f"{labels.min()} to {labels.max()}"
        raise BetonError(path, f"labels {found_labels}, outside 0 to {num_classes - 1}")
    if index_crc32(header, metadata, crcs, allocations) != sidecar["index_crc32"]:
        raise BetonError(path, "damaged, or not the file of its sidecar (the CRC32s differ)")
    if deep:
        _check_data(path, content, allocations, crcs)
    return sidecar


def _check_header(path: Path, size: int, header: np.void) -> tuple[int, int]:
    """(number of samples, address of the allocation table)"""
    version, num_fields, page_size, num_samples, table = header.tolist()
    if version != BETON_VERSION:
        raise BetonError(path, f"not a .beton file (version {version}, expected {BETON_VERSION})")
    if num_fields > 64 or page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise BetonError(path, f"bad header ({num_fields} fields, pages of {page_size} bytes)")
    if num_fields != len(FIELDS):
        raise BetonError(path, f"{num_fields} fields, expected exactly image and label")
    if table == 0:
        raise BetonError(path, "unfinished file (the writer was interrupted)")
    if num_samples == 0:
        raise BetonError(path, "no samples")
    if table > size or (size - table) % ALLOCATION.itemsize:
        raise BetonError(path, f"truncated (allocation table at {table}, file has {size} bytes)")
    entries = (size - table) // ALLOCATION.itemsize
    if entries != num_samples:
        raise BetonError(
            path, f"truncated (allocation table has {entries} entries, expected {num_samples})"
        )
    return num_samples, table


def _check_samples(
    path: Path, metadata: np.ndarray, allocations: np.ndarray, start: int, end: int
) -> None:
    """Every image has pixels, and its bytes lie inside [start, end)."""
    image = metadata["image"]
    for key in "width", "height":
        if not image[key].all():
            raise BetonError(path, f"sample {image[key].argmin()} has {key} 0")
    ptr, size = allocations["ptr"], allocations["size"]
    # In this order no sum can wrap around.
    inside = (ptr >= start) & (ptr <= end) & (size > 0) & (size <= end - np.minimum(ptr, end))
    inside &= ptr == image["data_ptr"]
    pixels = 3 * image["width"].astype(np.int64) * image["height"]
    inside &= (image["mode"] == JPEG) | ((image["mode"] == RAW) & (size == pixels))
    if not inside.all():
        raise BetonError(path, f"the data of sample {inside.argmin()} is not where it should be")
    if not (allocations["sample_id"] == np.arange(len(metadata))).all():
        raise BetonError(path, "its allocation table is not in data set order")


def _check_data(path: Path, content: np.ndarray, allocations: np.ndarray, crcs: np.ndarray) -> None:
    damaged = [
        sample
        for sample, (_, ptr, size) in enumerate(allocations.tolist())
        if zlib.crc32(content[ptr : ptr + size].tobytes()) != crcs[sample]
    ]
    if damaged:
        some = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        raise BetonError(path, f"{len(damaged)} damaged samples ({some})")


def _read_sidecar(path: Path) -> dict[str, Any]:
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise BetonError(path, f"its description {os.fspath(sidecar)} is missing")
    try:
        content = json.loads(sidecar.read_bytes())
    except ValueError as error:
        raise BetonError(path, f"its description {sidecar} is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != SIDECAR_FORMAT:
        raise BetonError(path, f"its description {sidecar} is not in format {SIDECAR_FORMAT}")
    missing = {"bytes", "num_samples", "num_classes", "index_crc32"} - content.keys()
    if missing:
        raise BetonError(path, f"its description {sidecar} lacks {', '.join(sorted(missing))}")
    return content
