"""The .beton file format of FFCV 1.0, and the sidecar that proves a file whole.

    header | fields | metadata of every sample | data, in pages | allocation table

A sample has one piece of data, its image, or two where the file has label maps too. The sidecar,
`train.beton.json`, describes the data set and holds a CRC32 of everything except the data.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BETON_VERSION = 2
SIDECAR_FORMAT = "evit-beton-3"
JPEG, RAW = 0, 1
Shape = tuple[int, int]

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4")]
    + [("num_samples", "<u8"), ("alloc_table_ptr", "<u8")],
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
MAP_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("length", "<u8"), ("dtype", "S15")])
MAP_DTYPE = b'[["", "<f2"]]'


class Layout(NamedTuple):
    """What a file stores of each sample; label maps are float16 (2, 5, H, W), or there are none."""

    label_map_shape: Shape | None = None

    @property
    def pieces(self) -> int:
        """Entries of the allocation table for each sample."""
        return 2 if self.label_map_shape else 1

    @property
    def metadata(self) -> np.dtype:
        label_map = [("label_map", "<u8")] if self.label_map_shape else []
        return np.dtype([("image", IMAGE), ("label", "<i8"), *label_map], align=True)

    @property
    def fields(self) -> np.ndarray:
        """FFCV's descriptions of an RGBImageField, an IntField and an NDArrayField."""
        fields = np.zeros(1 + self.pieces, FIELD)
        fields["type_id"] = (2, 1, 4)[: len(fields)]
        fields["name"] = (b"image", b"label", b"label_map")[: len(fields)]
        if self.label_map_shape:
            arguments = np.zeros(1, MAP_ARGUMENTS)
            arguments["shape"][0, :4] = 2, 5, *self.label_map_shape
            arguments["length"], arguments["dtype"] = len(MAP_DTYPE), MAP_DTYPE
            fields["arguments"][2, : MAP_ARGUMENTS.itemsize] = arguments.view(np.uint8)
        return fields

    @property
    def metadata_start(self) -> int:
        return HEADER.itemsize + self.fields.nbytes


class BetonError(ValueError):
    """A .beton file, or its sidecar, that must not be read."""

    def __init__(
        self, path: str | Path, reason: str, way_out: str = "delete it and prepare the data again"
    ) -> None:
        super().__init__(f"{path}: {reason}; {way_out}")


class DamagedSample(ValueError):
    """What is wrong with a sample, for the caller that knows the file."""


def sidecar_path(path: str | Path) -> Path:
    """train.beton -> train.beton.json"""
    return Path(f"{path}.json")


def sidecar_crc32(content: dict[str, Any]) -> int:
    """CRC32 of a sidecar's content, without the CRC32 itself."""
    rest = {key: value for key, value in content.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def check_beton(path: str | Path) -> dict[str, Any]:
    """Verify that a file is as it was written, but for its data, and return its sidecar.

    Costs a tenth of a second for ImageNet. FFCV could crash or lie on another file. A damaged JPEG
    is found when it is decoded, damaged raw pixels never.

    Raises:
        BetonError: says what is wrong and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise BetonError(path, "no such file", "prepare the data first")
    try:
        sidecar = json.loads(sidecar_path(path).read_bytes())
        if sidecar["format"] != SIDECAR_FORMAT or sidecar["crc32"] != sidecar_crc32(sidecar):
            raise ValueError(f"damaged, or not in format {SIDECAR_FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"its description {sidecar_path(path)} cannot be used ({error})"
        raise BetonError(path, reason) from error
    if path.stat().st_size != sidecar["bytes"]:
        found = f"{path.stat().st_size} bytes, not {sidecar['bytes']}"
        raise BetonError(path, f"truncated, or not the file of its sidecar ({found})")
    shape, count = sidecar.get("label_map_shape"), sidecar["num_samples"]
    layout = Layout(shape and tuple(shape))
    start = layout.metadata_start + count * layout.metadata.itemsize
    end = sidecar["bytes"] - count * layout.pieces * ALLOCATION.itemsize
    try:
        content = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise BetonError(path, f"cannot be read ({error.strerror})", "make it readable") from error
    fields = content[HEADER.itemsize : layout.metadata_start].tobytes()
    if fields != layout.fields.tobytes():  # of a field of another type FFCV unpickles the rest
        raise BetonError(path, "its fields are not exactly image and label, or these and label_map")
    start_crc32 = zlib.crc32(content[:start].tobytes())
    if zlib.crc32(content[end:].tobytes(), start_crc32) != sidecar["index_crc32"]:
        raise BetonError(path, "damaged, or not the file of its sidecar (the CRC32s differ)")
    return sidecar
