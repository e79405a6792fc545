"""Where the samples of a .beton file are: its metadata, its CRC32s and its allocation table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from evit.data.ffcv import format as beton
from evit.data.ffcv.encode import Skipped, Stored

PAGE_SIZE = 2**23


class Index:
    """Grows by one sample at a time, and is written around their data at the end."""

    def __init__(self, max_samples: int, layout: beton.Layout):
        self.layout = layout
        self.metadata = np.zeros(max_samples, layout.metadata)
        self.allocations = np.zeros((max_samples, layout.pieces), beton.ALLOCATION)
        self.crcs = np.zeros((max_samples, layout.pieces), beton.CRC)
        self.skipped: list[Skipped] = []
        self.page_size, self.count, self.kept = PAGE_SIZE, 0, 0
        self.end = layout.metadata_start + self.metadata.nbytes

    def place(self, sizes: Sequence[int]) -> list[int]:
        """Where the pieces of the next sample go."""
        starts, end = [], self.end
        for size in sizes:
            self._fit(size)
            if end % self.page_size + size > self.page_size:
                end += self.page_size - end % self.page_size
            starts.append(end)
            end += size
        return starts

    def _fit(self, size: int) -> None:
        # FFCV's process cache wants a sample inside one page. One that crosses no boundary of
        # small pages crosses none of larger ones, so pages can grow as they have to.
        while self.page_size < size:
            self.page_size *= 2

    def add(self, record: Stored | Skipped) -> None:
        if isinstance(record, Skipped):
            self.skipped.append(record)
            return
        for size in record.sizes:
            self._fit(size)
        self.allocations[self.count] = [
            (self.count, *place) for place in zip(record.starts, record.sizes, strict=True)
        ]
        self.crcs[self.count] = record.crcs
        start, *map_start = record.starts
        image = record.mode, record.width, record.height, start
        self.metadata[self.count] = image, record.label, *map_start
        self.end = record.end
        self.count += 1
        self.kept += record.original

    def write(self, file: BinaryIO) -> dict[str, Any]:
        """Write it to the file of the data, and return what the sidecar says about the content."""
        count = self.count
        metadata, allocations = self.metadata[:count], self.allocations[:count]
        crcs = self.crcs[:count]
        file.seek(self.end)
        file.write(crcs.tobytes())
        table = file.tell()
        file.write(allocations.tobytes())
        num_bytes = file.tell()
        fields = self.layout.fields
        header = np.array(
            [(beton.BETON_VERSION, len(fields), self.page_size, count, table)], beton.HEADER
        )
        file.seek(0)
        for part in header, fields, self.metadata:
            file.write(part.tobytes())

        width, height = metadata["image"]["width"], metadata["image"]["height"]
        shape = self.layout.label_map_shape
        return {
            **({"label_map_shape": list(shape)} if shape else {}),
            "num_samples": count,
            "bytes": num_bytes,
            "page_size": self.page_size,
            "index_crc32": beton.index_crc32(header, fields, metadata, crcs, allocations),
            "kept_original": self.kept,
            "max_width": int(width.max(initial=0)),
            "max_height": int(height.max(initial=0)),
            "median_short_side": float(np.median(np.minimum(width, height))) if count else 0.0,
            "skipped": [sample._asdict() for sample in self.skipped],
        }
