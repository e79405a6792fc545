"""FFCV, imported here alone and without its side effects, and its .beton files, version 1.0:
header, fields, metadata of every sample, data in pages, allocation table. The sidecar,
x.beton.json, describes the file and holds a CRC32 of everything except the data."""

# ruff: noqa: F401

import json
import zlib
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

config: Any = numba.config

# Of numba's kinds of threads, "workqueue" aborts the process when two loaders run at once.
if config.THREADING_LAYER == "default":
    config.THREADING_LAYER = "threadsafe"
# Importing FFCV leaves PyTorch with one thread.
_torch_threads = torch.get_num_threads()
# FFCV keeps two numbers in numba's dictionary, which takes seconds to compile in every process.
_numba_dict, numba.typed.Dict = numba.typed.Dict, dict
try:
    from ffcv import types
    from ffcv.fields.rgb_image import get_random_crop
except (ImportError, OSError, ValueError) as error:
    way = "libopencv-dev libturbojpeg0-dev libjpeg-dev pkg-config g++ libtbb12, then pip's ffcv"
    raise ImportError(f"FFCV is not usable ({error}): `make setup`, or install {way}") from error
finally:
    torch.set_num_threads(_torch_threads)
    numba.typed.Dict = _numba_dict

SIDECAR_FORMAT = "evit-beton-3"
JPEG, RAW = 0, 1
HEADER, FIELD, ALLOCATION = types.HeaderType, types.FieldDescType, types.ALLOC_TABLE_TYPE


def layout(label_map_shape: Any = None) -> tuple[np.ndarray, np.dtype]:
    """The fields image, label and perhaps label_map, as FFCV describes them, and their record."""
    handlers: dict[str, Any] = dict(image=types.RGBImageField(), label=types.IntField())
    if label_map_shape:
        handlers["label_map"] = types.NDArrayField(np.dtype("<f2"), (2, 5, *label_map_shape))
    type_ids = {kind: number for number, kind in types.TYPE_ID_HANDLER.items()}
    fields = np.zeros(len(handlers), FIELD)
    for field, (name, handler) in zip(fields, handlers.items(), strict=True):
        field["type_id"] = type_ids[type(handler)]
        field["name"][: len(name)] = list(name.encode())
        field["arguments"] = handler.to_binary()[0]
    return fields, types.get_metadata_type(list(handlers.values()))


class BetonError(ValueError):
    """A .beton file, or its sidecar, that must not be read."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; delete it and prepare the data again")


def sidecar_path(path: str | Path) -> Path:
    return Path(f"{path}.json")


def sidecar_crc32(content: dict[str, Any]) -> int:
    rest = {key: value for key, value in content.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def open_beton(path: str | Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """Check all of a file but its data; return its sidecar, its bytes, and each sample's metadata
    and image size. Damage to a JPEG is found when it is decoded, damage to raw pixels never."""
    try:
        content = np.memmap(path, np.uint8, "r")
        sidecar = json.loads(sidecar_path(path).read_bytes())
        if sidecar["format"] != SIDECAR_FORMAT or sidecar["crc32"] != sidecar_crc32(sidecar):
            raise ValueError(f"{sidecar_path(path)} is damaged, or not in format {SIDECAR_FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it or its description, {sidecar_path(path)}, cannot be used ({error})"
        raise BetonError(path, reason) from error
    if len(content) != sidecar["bytes"]:
        found = f"{len(content)} bytes, not {sidecar['bytes']}"
        raise BetonError(path, f"truncated, or not the file of its sidecar ({found})")
    fields, metadata = layout(sidecar.get("label_map_shape"))
    begin, count, pieces = HEADER.itemsize + fields.nbytes, sidecar["num_samples"], len(fields) - 1
    if content[HEADER.itemsize : begin].tobytes() != fields.tobytes():  # FFCV unpickles others
        raise BetonError(path, "its fields are not exactly image and label, or these and label_map")
    start = content[: begin + count * metadata.itemsize].tobytes()
    end = content[len(content) - count * pieces * ALLOCATION.itemsize :].tobytes()
    if zlib.crc32(end, zlib.crc32(start)) != sidecar["index_crc32"]:
        raise BetonError(path, "damaged, or not the file of its sidecar (the CRC32s differ)")
    sizes = np.frombuffer(end, ALLOCATION)["size"][::pieces]
    return sidecar, content, np.frombuffer(start, metadata, count, begin), sizes
