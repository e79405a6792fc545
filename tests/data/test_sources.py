"""Where images come from."""

import gzip
import itertools

import pytest

from evit.data import sources


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
