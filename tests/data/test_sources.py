"""Where images come from."""

import gzip
import itertools

import pytest

from evit.data import folders as sources


@pytest.mark.skipif(not sources.DEBIAN_FASHION_MNIST.is_dir(), reason="needs the Debian package")
def test_two_runs_may_unpack_the_embedded_data_at_once(tmp_path, monkeypatch):
    unpacked, unpack = [], gzip.decompress

    def overtaken(packed):
        if not unpacked:  # another run, from beginning to end
            unpacked.append(packed)
            unpacked.append(sources.fashion_mnist(tmp_path, train=False))
        return unpack(packed)

    monkeypatch.setattr(sources.gzip, "decompress", overtaken)
    monkeypatch.setattr(sources.os, "getpid", itertools.count().__next__)
    images = sources.fashion_mnist(tmp_path, train=False)
    assert (images.data == unpacked[1].data).all()
    assert [path.name for path in (tmp_path / "FashionMNIST").iterdir()] == ["raw"]


def test_a_fingerprint_is_of_names_below_the_root_sizes_and_labels(tmp_path):
    def fingerprint(root, size=3, label=0):
        path, beside = root / "train" / "cat" / "1.jpg", root.parent / "maps" / "1.npz"
        for file in path, beside:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(size))
        return sources.fingerprint([(str(path), label), (str(beside), 0)], root)

    found = fingerprint(tmp_path / "here" / "photos")
    assert fingerprint(tmp_path / "there" / "photos") == found
    assert fingerprint(tmp_path / "there" / "photos", size=4) != found
    assert fingerprint(tmp_path / "there" / "photos", label=1) != found
    assert found.startswith("74debc903d5b")  # another would write every data set anew
