"""Where images come from."""

import gzip
import itertools
import os

import pytest

from evit.data import datasets, folders
from evit.data.datasets import FashionMNIST
from tests.data.build import module


@pytest.mark.skipif(not datasets.DEBIAN_FASHION_MNIST.is_dir(), reason="needs the Debian package")
def test_two_runs_may_unpack_the_embedded_data_at_once(tmp_path, monkeypatch):
    unpacked, unpack = [], gzip.decompress
    data = module(FashionMNIST, cache_dir=tmp_path, mode="raw")

    def overtaken(packed):
        if not unpacked:  # another run, from beginning to end
            unpacked.append(packed)
            unpacked.append(data.dataset("val", None))
        return unpack(packed)

    monkeypatch.setattr(datasets.gzip, "decompress", overtaken)
    monkeypatch.setattr(datasets.os, "getpid", itertools.count().__next__)
    images = data.dataset("val", None)
    assert (images.data == unpacked[1].data).all()
    assert [path.name for path in (tmp_path / "FashionMNIST").iterdir()] == ["raw"]


def test_a_fingerprint_is_of_names_below_the_root_sizes_times_and_labels(tmp_path):
    def fingerprint(root, size=3, time=1_000_000, label=0):
        path, beside = root / "train" / "cat" / "1.jpg", root.parent / "maps" / "1.npz"
        for file in path, beside:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(size))
            os.utime(file, (time, time))
        return folders.fingerprint([(str(path), label), (str(beside), 0)], root)

    found = fingerprint(tmp_path / "here" / "photos")
    assert fingerprint(tmp_path / "there" / "photos") == found
    for change in dict(size=4), dict(time=1_000_001), dict(label=1):
        assert fingerprint(tmp_path / "there" / "photos", **change) != found
