"""Where images come from."""

import gzip
import os

import numpy as np
import pytest

from evit.data import FashionMNIST, folders
from evit.data import module as datasets
from tests.data.build import module


@pytest.mark.skipif(not datasets.DEBIAN_FASHION_MNIST.is_dir(), reason="needs the Debian package")
def test_two_runs_may_unpack_the_embedded_data_at_once(tmp_path, monkeypatch):
    unpacked, unpack = [], gzip.decompress
    data = module(FashionMNIST, cache_dir=tmp_path, mode="raw")

    def overtaken(packed):
        if not unpacked:  # another run, from beginning to end
            unpacked.append(packed)
            unpacked.append(data.dataset("val"))
        return unpack(packed)

    monkeypatch.setattr(datasets.gzip, "decompress", overtaken)
    images = data.dataset("val")
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


class Small(list):
    """What torchvision's CIFAR10 is once it is there."""

    classes = ["a", "b"]

    def __init__(self, root, train, download):
        assert download
        self.data = (
            np.arange(8 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(8, 32, 32, 3)
        )
        self.targets = [k % 2 for k in range(8)]


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_what_torchvision_downloads_is_written_once_and_streamed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.torchvision.datasets, name, Small)
    options = dict(cache_dir=tmp_path, dataset=name, img_size=32, batch_size=8, crop_pct=1.0)
    data = module(datasets.auto, **options)
    assert (
        data.num_classes == int(name.removeprefix("CIFAR")) and data.num_images("train") == 50_000
    )
    data.prepare_data()
    written = data.beton_dir / "train.beton"
    before = written.stat().st_mtime_ns
    data.prepare_data()
    data.setup()
    ((images, labels),) = data.val_dataloader()
    assert written.stat().st_mtime_ns == before and data.classes == ["a", "b"]
    assert labels.tolist() == [0, 1] * 4
    assert (images.permute(0, 2, 3, 1).numpy() == Small("", True, True).data).all()


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "FashionMNIST"])
def test_without_a_network_it_is_said_where_to_put_the_files(name, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network\nhere")

    monkeypatch.setattr(datasets.torchvision.datasets, name, unreachable)
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    with pytest.raises(ValueError) as refusal:
        module(datasets.auto, dataset=name, cache_dir=tmp_path).samples("train")
    message = str(refusal.value)
    assert f"put {datasets.DOWNLOADS[name][3]} into {tmp_path}" in message and "\n" not in message
    assert "data.root=DIR" in message
