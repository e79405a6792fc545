import json

import numpy as np
import pytest

from evit.data.ffcv import format as beton
from evit.data.ffcv.format import BetonError, check_beton, sidecar_path


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


def random_bytes(path):
    content = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8).tobytes()
    path.write_bytes(b"\x02\x00" + content)


def unfinished(path):
    """What FFCV's own writer leaves when it is killed."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    writer = DatasetWriter(str(path), {"image": RGBImageField(), "label": IntField()})
    writer.num_samples = 100
    writer.prepare()
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    with open(path, "ab") as file:
        file.write(bytes(100_000))


def test_the_layout_is_that_of_ffcv():
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    for ours, theirs in (
        (beton.HEADER, types.HeaderType),
        (beton.ALLOCATION, types.ALLOC_TABLE_TYPE),
        (beton.Layout().metadata, types.get_metadata_type([RGBImageField(), IntField()])),
        (beton.FIELD, types.FieldDescType),
    ):
        assert ours.itemsize == theirs.itemsize
        offsets = [[dtype.fields[name][1] for name in dtype.names] for dtype in (ours, theirs)]
        assert offsets[0] == offsets[1]
    assert types.CURRENT_VERSION == beton.BETON_VERSION
    assert [types.TYPE_ID_HANDLER[i] for i in beton.Layout().fields["type_id"]] == [
        RGBImageField,
        IntField,
    ]


def test_a_whole_file_passes_and_gives_its_sidecar(written):
    assert check_beton(written) == json.loads(sidecar_path(written).read_text())


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(BetonError, match="none.beton: no such file; prepare"):
        check_beton(tmp_path / "none.beton")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(BetonError, match="not a regular file"):
        check_beton(tmp_path)


DAMAGES = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes, too short"),
    "text": (lambda p: p.write_text("not images\n" * 1000), "not a .beton file"),
    "jpeg": (lambda p: p.write_bytes(b"\xff\xd8\xff\xe0" + bytes(5000)), "not a .beton file"),
    "random": (random_bytes, "bad header"),
    "cut at 50 %": (lambda p: keep(p, 0.5), "truncated"),
    "cut at 90 %": (lambda p: keep(p, 0.9), "truncated"),
    "last entries missing": (
        lambda p: p.write_bytes(p.read_bytes()[: -24 * 7]),
        "allocation table has 64 entries, expected 71",
    ),
    "writer killed": (unfinished, "unfinished file"),
    "no samples": (lambda p: change_header(p, num_samples=0), "no samples"),
    "too many samples": (
        lambda p: change_header(p, num_samples=2**40),
        r"truncated \(allocation table has 71",
    ),
    "odd page size": (lambda p: change_header(p, page_size=2**21 + 1), "bad header"),
    "one field": (lambda p: change_header(p, num_fields=1), "1 fields, expected exactly"),
    "other field": (
        lambda p: change(p, beton.FIELD, beton.HEADER.itemsize, name=b"picture"),
        "not exactly image and label",
    ),
    "no width": (
        lambda p: change(p, beton.IMAGE, beton.Layout().metadata_start, width=0),
        "sample 0 has width 0",
    ),
    "data outside the file": (
        lambda p: change(p, beton.ALLOCATION, table(p), ptr=2**63),
        "data of sample 0",
    ),
    "data too long": (
        lambda p: change(p, beton.ALLOCATION, table(p), size=2**64 - 1),
        "data of sample 0",
    ),
    "data of no bytes": (
        lambda p: change(p, beton.ALLOCATION, table(p), size=0),
        "data of sample 0",
    ),
    "other label": (
        lambda p: change(p, beton.Layout().metadata, beton.Layout().metadata_start, label=1),
        "the CRC32s differ",
    ),
    "label too large": (
        lambda p: change(p, beton.Layout().metadata, beton.Layout().metadata_start, label=3),
        "labels 0 to 3, outside 0 to 2",
    ),
    "negative label": (
        lambda p: change(p, beton.Layout().metadata, beton.Layout().metadata_start, label=-1),
        "labels -1 to 2, outside",
    ),
    "no sidecar": (lambda p: sidecar_path(p).unlink(), "copy.beton.json is missing"),
    "half a sidecar": (lambda p: keep(sidecar_path(p), 0.5), "is not JSON"),
    "sidecar of another format": (lambda p: change_sidecar(p, format="x"), "not in format"),
    "sidecar without a key": (
        lambda p: sidecar_path(p).write_text(json.dumps({"format": beton.SIDECAR_FORMAT})),
        "lacks bytes, classes, crc32, index_crc32, num_classes, num_samples",
    ),
    "sidecar of another size": (lambda p: change_sidecar(p, bytes=1), "another file: bytes 1"),
    "sidecar of fewer samples": (
        lambda p: change_sidecar(p, num_samples=70),
        "another file: num_samples 70",
    ),
    "sidecar of other classes": (
        lambda p: change_sidecar(p, num_classes=4),
        "num_classes 4, not 3",
    ),
    "sidecar with a changed name": (
        lambda p: sidecar_path(p).write_text(sidecar_path(p).read_text().replace('"b"', '"d"')),
        "copy.beton.json is damaged",
    ),
    "sidecar of another file": (lambda p: change_sidecar(p, index_crc32=1), "CRC32s differ"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_with_the_reason_and_the_way_out(copied, name):
    check_beton(copied)
    damage, reason = DAMAGES[name]
    damage(copied)
    with pytest.raises(BetonError, match=reason) as refusal:
        check_beton(copied)
    assert str(copied) in str(refusal.value) and "prepare the data again" in str(refusal.value)
