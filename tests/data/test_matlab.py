"""The reader of the devkit's meta.mat, on one that scipy.io.savemat has written, compressed."""

import struct
from pathlib import Path

import pytest

from evit.data.matlab import read_matlab

META = Path(__file__).with_name("meta.mat").read_bytes()


def test_a_struct_array_has_its_texts_and_numbers():
    synsets = read_matlab(META)["synsets"]
    assert [synset["WNID"] for synset in synsets] == [
        *("n01484850", "n01440764", "n01443537", "n00001740")
    ]
    assert [synset["ILSVRC2012_ID"].item() for synset in synsets] == [1, 2, 3, 4]
    assert [synset["children"].tolist() for synset in synsets] == [[], [], [], [1, 2, 3]]
    assert synsets[0]["words"] == "crème, a fish"


@pytest.mark.parametrize("order, sign", [("<", b"IM"), (">", b"MI")])
def test_both_byte_orders_are_read(order, sign):
    def element(kind: int, content: bytes) -> bytes:
        padding = bytes(-len(content) % 8)
        return struct.pack(f"{order}2I", kind, len(content)) + content + padding

    flags, shape = struct.pack(f"{order}2I", 6, 0), struct.pack(f"{order}2i", 1, 3)
    name = struct.pack(f"{order}I4s", 2 << 16 | 1, b"up")  # two bytes of type 1, in their tag
    numbers = struct.pack(f"{order}3h", 1, -2, 300)  # MATLAB stores doubles as small as they are
    array = element(6, flags) + element(5, shape) + name + element(3, numbers)
    data = bytes(126) + sign + element(14, array)
    assert read_matlab(data)["up"].tolist() == [1, -2, 300]


def test_a_file_that_ends_too_early_is_an_error():
    for size in range(129, len(META)):
        with pytest.raises((ValueError, struct.error)):
            read_matlab(META[:size])
