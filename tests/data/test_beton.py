import json
import shutil

import numpy as np
import pytest
from ffcv.fields import IntField, NDArrayField, RGBImageField
from ffcv.writer import DatasetWriter

from evit.data import ffcv as beton
from evit.data.ffcv import BetonError, open_beton, sidecar_path
from evit.data.ffcv.write import write_beton


def change(path, dtype, offset, **values):
    """Overwrite entries of the structure that lies at an offset of the file."""
    content = bytearray(path.read_bytes())
    record = np.frombuffer(content, dtype, 1, offset)
    for key, value in values.items():
        record[key] = value
    path.write_bytes(content)


def change_header(path, **values):
    change(path, beton.HEADER, 0, **values)


def change_sidecar(path, **values):
    sidecar = sidecar_path(path)
    content = {**json.loads(sidecar.read_text()), **values}
    sidecar.write_text(json.dumps(content | {"crc32": beton.sidecar_crc32(content)}))


def keep(path, fraction):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


def table(path):
    return int(np.fromfile(path, beton.HEADER, 1)["alloc_table_ptr"][0])


def test_a_whole_file_passes_and_gives_its_sidecar(written):
    assert open_beton(written)[0] == json.loads(sidecar_path(written).read_text())


SIZE = "truncated, or not the file of its sidecar"
CRC = "the CRC32s differ"
DESCRIPTION = "copy.beton.json, cannot be used"
FIELDS, METADATA = beton.layout()
START = beton.HEADER.itemsize + FIELDS.nbytes
DAMAGES = {
    "missing": (lambda p: p.unlink(), "No such file"),
    "empty": (lambda p: p.write_bytes(b""), DESCRIPTION),
    "text": (lambda p: p.write_text("not images\n" * 1000), SIZE),
    "cut at 50 %": (lambda p: keep(p, 0.5), SIZE),
    "last entries missing": (lambda p: p.write_bytes(p.read_bytes()[: -24 * 7]), SIZE),
    "no samples": (lambda p: change_header(p, num_samples=0), CRC),
    "other field": (lambda p: change(p, beton.FIELD, beton.HEADER.itemsize, name=120), "fields"),
    "data outside the file": (lambda p: change(p, beton.ALLOCATION, table(p), ptr=2**63), CRC),
    "other label": (lambda p: change(p, METADATA, START, f1=1), CRC),
    "no sidecar": (lambda p: sidecar_path(p).unlink(), DESCRIPTION),
    "half a sidecar": (lambda p: keep(sidecar_path(p), 0.5), DESCRIPTION),
    "sidecar of another format": (lambda p: change_sidecar(p, format="x"), "not in format"),
    "sidecar without a key": (
        lambda p: sidecar_path(p).write_text(json.dumps({"format": beton.SIDECAR_FORMAT})),
        DESCRIPTION,
    ),
    "sidecar of another size": (lambda p: change_sidecar(p, bytes=1), SIZE),
    "sidecar of fewer samples": (lambda p: change_sidecar(p, num_samples=70), CRC),
    "sidecar of label maps": (lambda p: change_sidecar(p, label_map_shape=[4, 3]), "fields"),
    "sidecar with a changed name": (
        lambda p: sidecar_path(p).write_text(sidecar_path(p).read_text().replace('"b"', '"d"')),
        "json is damaged, or",
    ),
    "sidecar of another file": (lambda p: change_sidecar(p, index_crc32=1), CRC),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_with_the_reason_and_the_way_out(copied, name):
    open_beton(copied)
    damage, reason = DAMAGES[name]
    damage(copied)
    with pytest.raises(BetonError, match=reason) as refusal:
        open_beton(copied)
    assert str(copied) in str(refusal.value) and "prepare the data again" in str(refusal.value)


def test_swapped_sidecars_are_noticed_also_of_files_of_one_length(written, samples, tmp_path):
    one, other = paths = [tmp_path / name for name in ("one.beton", "other.beton")]
    for shift, path in enumerate(paths):
        shifted = [(image, (label + shift) % 3) for image, label in samples[:6]]
        write_beton(path, shifted, classes=[*"abc"], source="test", num_workers=1)
    assert one.stat().st_size == other.stat().st_size
    sidecar_path(one).rename(tmp_path / "aside")
    sidecar_path(other).rename(sidecar_path(one))  # where a writer was killed between its renames
    (tmp_path / "aside").rename(sidecar_path(other))
    for path in paths:
        with pytest.raises(BetonError, match=f"not the file of its sidecar .{CRC}"):
            open_beton(path)
        shutil.copy(sidecar_path(written), sidecar_path(path))
        with pytest.raises(BetonError, match=SIZE):
            open_beton(path)


MAP = NDArrayField(np.dtype("f2"), (2, 5, 1, 1))


@pytest.mark.parametrize(
    "fields",
    [
        dict(image=RGBImageField(), label=IntField()),
        dict(image=RGBImageField("raw"), label=IntField(), label_map=MAP),
    ],
)
def test_a_file_of_ffcv_s_own_writer_is_refused(fields, written, picture, tmp_path):
    path, label_map = tmp_path / "x.beton", np.zeros((2, 5, 1, 1), np.float16)
    rows = [(np.asarray(picture(k, 20, 20)), k, label_map)[: len(fields)] for k in range(3)]
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(rows)
    for reason in "x.beton.json, cannot be used .*No such file", SIZE:
        with pytest.raises(BetonError, match=f"{reason}.*; delete it and prepare the data again$"):
            open_beton(path)
        shutil.copy(sidecar_path(written), sidecar_path(path))
