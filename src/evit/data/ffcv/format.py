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
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
MAP_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("length", "<u8"), ("dtype", "S15")])
MAP_DTYPE = b'[["", "<f2"]]'


class Layout(NamedTuple):
    """What a file stores of each sample; label maps are float16 (2, 5, H, W), or there are none."""

    label_map_shape: Shape | None = None

    @property
    def pieces(self) -> int:
        """Entries of the allocation table for each sample."""
        return 1 if self.label_map_shape is None else 2

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

    @property
    def map_bytes(self) -> int:
        height, width = self.label_map_shape or (0, 0)
        return 2 * 5 * height * width * 2


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


def index_crc32(*parts: np.ndarray) -> int:
    """CRC32 of a file's header, fields, metadata and allocation table, in this order."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part.tobytes(), crc)
    return crc


def check_beton(path: str | Path) -> dict[str, Any]:
    """Verify a file, on which FFCV could crash or lie, and return its sidecar.

    The sidecar says `label_map_shape`, [H, W], where the file has label maps. Costs a tenth of a
    second for ImageNet. A damaged JPEG is found when it is decoded, damaged raw pixels never.

    Raises:
        BetonError: says what is wrong and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise BetonError(path, "no such file", "prepare the data first")
    if not path.is_file():
        raise BetonError(path, "not a regular file")
    size = path.stat().st_size
    if size < Layout().metadata_start:
        raise BetonError(path, f"{size} bytes, too short for a .beton header")
    try:
        content = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise BetonError(path, f"cannot be read ({error.strerror})", "make it readable") from error
    header = content[: HEADER.itemsize].view(HEADER)
    num_samples, table, layout = _check_header(path, content, header[0])

    metadata_end = layout.metadata_start + num_samples * layout.metadata.itemsize
    if metadata_end > table:
        raise BetonError(path, f"bad header: no room for {num_samples} samples")
    metadata = content[layout.metadata_start : metadata_end].view(layout.metadata)
    allocations = content[table:].view(ALLOCATION)
    sidecar = _read_sidecar(path)
    _check_samples(path, layout, metadata, allocations, metadata_end, table)

    shape = layout.label_map_shape and list(layout.label_map_shape)
    for key, found in (
        ("bytes", size),
        ("num_samples", num_samples),
        ("label_map_shape", shape),
        ("num_classes", len(sidecar["classes"])),
    ):
        if sidecar.get(key) != found:
            wrong = f"{key} {sidecar.get(key)}, not {found}"
            raise BetonError(path, f"its sidecar was written for another file: {wrong}")
    labels, num_classes = metadata["label"], sidecar["num_classes"]
    if labels.min() < 0 or labels.max() >= num_classes:
        found_labels = f"{labels.min()} to {labels.max()}"
        raise BetonError(path, f"labels {found_labels}, outside 0 to {num_classes - 1}")
    if index_crc32(header, layout.fields, metadata, allocations) != sidecar["index_crc32"]:
        raise BetonError(path, "damaged, or not the file of its sidecar (the CRC32s differ)")
    return sidecar


def _check_header(path: Path, content: np.ndarray, header: np.void) -> tuple[int, int, Layout]:
    """(number of samples, address of the allocation table, what is stored of each sample)"""
    size = len(content)
    version, num_fields, page_size, num_samples, table = header.tolist()
    if version != BETON_VERSION:
        raise BetonError(path, f"not a .beton file (version {version}, expected {BETON_VERSION})")
    if num_fields > 64 or page_size < 2**21 or page_size & (page_size - 1):
        raise BetonError(path, f"bad header ({num_fields} fields, pages of {page_size} bytes)")
    if num_fields not in (2, 3):
        raise BetonError(path, f"{num_fields} fields, expected exactly image and label")
    if table == 0:
        raise BetonError(path, "unfinished file (the writer was interrupted)")
    if num_samples == 0:
        raise BetonError(path, "no samples")
    if table > size or (size - table) % ALLOCATION.itemsize:
        raise BetonError(path, f"truncated (allocation table at {table}, file has {size} bytes)")
    layout, start = Layout(), Layout().metadata_start
    if num_fields == 3 and size >= start + FIELD.itemsize:
        field = content[start : start + FIELD.itemsize].view(FIELD)
        shape = field["arguments"][0, : MAP_ARGUMENTS.itemsize].view(MAP_ARGUMENTS)["shape"]
        layout = Layout((int(shape[0, 2]), int(shape[0, 3])))
    fields = content[HEADER.itemsize : layout.metadata_start]
    if num_fields != len(layout.fields) or fields.tobytes() != layout.fields.tobytes():
        raise BetonError(path, "its fields are not exactly image and label, or these and label_map")
    entries, expected = (size - table) // ALLOCATION.itemsize, num_samples * layout.pieces
    if entries != expected:
        raise BetonError(
            path, f"truncated (allocation table has {entries} entries, expected {expected})"
        )
    return num_samples, table, layout


def _check_samples(
    path: Path,
    layout: Layout,
    metadata: np.ndarray,
    allocations: np.ndarray,
    start: int,
    end: int,
) -> None:
    """Every image has pixels, and its bytes and its label map's lie inside [start, end)."""
    image = metadata["image"]
    for key in "width", "height":
        if not image[key].all():
            raise BetonError(path, f"sample {image[key].argmin()} has {key} 0")
    pieces = allocations.reshape(len(metadata), layout.pieces)
    ptr, size = pieces["ptr"], pieces["size"]
    # In this order no sum can wrap around.
    inside = (ptr >= start) & (ptr <= end) & (size > 0) & (size <= end - np.minimum(ptr, end))
    inside[:, 0] &= ptr[:, 0] == image["data_ptr"]
    pixels = 3 * image["width"].astype(np.int64) * image["height"]
    raw = (image["mode"] == RAW) & (size[:, 0] == pixels)
    inside[:, 0] &= (image["mode"] == JPEG) | raw
    if layout.label_map_shape is not None:
        inside[:, 1] &= (ptr[:, 1] == metadata["label_map"]) & (size[:, 1] == layout.map_bytes)
    inside = inside.all(1)
    if not inside.all():
        raise BetonError(path, f"the data of sample {inside.argmin()} is not where it should be")
    if not (pieces["sample_id"] == np.arange(len(metadata))[:, None]).all():
        raise BetonError(path, "its allocation table is not in data set order")


def _read_sidecar(path: Path) -> dict[str, Any]:
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise BetonError(path, f"its description {sidecar} is missing")
    try:
        content = json.loads(sidecar.read_bytes())
    except ValueError as error:
        raise BetonError(path, f"its description {sidecar} is not JSON ({error})") from error
    except OSError as error:
        reason = f"its description {sidecar} cannot be read ({error.strerror})"
        raise BetonError(path, reason, "make it readable") from error
    if not isinstance(content, dict) or content.get("format") != SIDECAR_FORMAT:
        raise BetonError(path, f"its description {sidecar} is not in format {SIDECAR_FORMAT}")
    expected = {"bytes", "num_samples", "classes", "num_classes", "index_crc32", "crc32"}
    if missing := expected - content.keys():
        raise BetonError(path, f"its description {sidecar} lacks {', '.join(sorted(missing))}")
    if content["crc32"] != sidecar_crc32(content):
        raise BetonError(path, f"its description {sidecar} is damaged (its CRC32 differs)")
    return content
