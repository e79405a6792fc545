"""ImageNet as people have it: every layout gives the same images, in the same order."""

import csv
import hashlib
import io
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from timm.data import ImageNetInfo
from torchvision.datasets import imagenet as torchvision_imagenet

from evit.commands import prepare as command
from evit.commands.prepare import find_images, prepare
from evit.data import Folder
from evit.data.folders import require_imagenet
from tests.data.build import folder, module

WNIDS = ["n01440764", "n01443537", "n01484850"]
TRUTH = [WNIDS[i] for i in (2, 0, 1, 1, 0, 2, 0)]  # the class of each validation image
OPTIONS = dict(mode="jpg", max_resolution=None, jpeg_quality=95, num_workers=1)
TRAIN, VAL, DEVKIT = (torchvision_imagenet.ARCHIVE_META[k][0] for k in ("train", "val", "devkit"))


@pytest.fixture(scope="module")
def tree(picture, tmp_path_factory) -> Path:
    """The standard tree: ROOT/train/WNID/WNID_1.JPEG, ROOT/val/WNID/ILSVRC2012_val_00000001.JPEG"""
    root = tmp_path_factory.mktemp("tree") / "imagenet"
    for k in range(10):
        wnid = WNIDS[k % 3]
        path = root / "train" / wnid / f"{wnid}_{k * 7}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k, 40 + k, 50).save(path)
    for number, wnid in enumerate(TRUTH, 1):
        path = root / "val" / wnid / f"ILSVRC2012_val_{number:08}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(100 + number, 50, 40 + number).save(path)
    return root


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    # Not in order, as in the archive of the validation images.
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern), reverse=True)}


def write_solution(root: Path) -> None:
    with open(root / command.SOLUTION, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for number, wnid in reversed([*enumerate(TRUTH, 1)]):
            rows.writerow([f"ILSVRC2012_val_{number:08}", f"{wnid} 1 2 3 4 {WNIDS[0]} 1 2 3 4"])


def flatten(tree: Path, folder: Path) -> None:
    folder.mkdir()
    for path in (tree / "val").glob("*/*"):
        shutil.copy(path, folder)


@pytest.fixture
def layout(tree, tmp_path, monkeypatch):
    """Makes a layout; the archives have their own checksums, the devkit has been read."""

    def make(name: str) -> Path:
        root = tmp_path / "imagenet"
        base = root / command.KAGGLE if name == "kaggle" else root
        base.mkdir(parents=True)
        if name == "archives":
            tars = {}
            for wnid in reversed(WNIDS):
                path = packed(root / "class.tar", contents(tree / "train" / wnid, "*"))
                tars[f"{wnid}.tar"] = path.read_bytes()
                path.unlink()
            archives = packed(root / TRAIN, tars), packed(root / VAL, contents(tree / "val", "*/*"))
            for split, path in zip(("train", "val"), archives, strict=True):
                md5 = hashlib.md5(path.read_bytes()).hexdigest()
                monkeypatch.setitem(torchvision_imagenet.ARCHIVE_META, split, (path.name, md5))
        else:
            shutil.copytree(tree / "train", base / "train")
            flatten(tree, base / "val")
        if name == "kaggle":
            write_solution(root)
        else:
            words = {wnid: (wnid,) for wnid in WNIDS}
            torch.save((words, TRUTH), root / torchvision_imagenet.META_FILE)
        return root

    return make


def read(samples):
    return [(label, Path(image).read_bytes()) for image, label in samples]


@pytest.mark.parametrize("name", ["flat val", "kaggle", "archives"])
def test_every_layout_has_the_images_labels_and_order_of_the_tree(tree, layout, name):
    classes, expected = find_images(tree)
    root = layout(name)
    for _ in range(2):  # what is unpacked is read as it is
        found_classes, found = find_images(root)
        assert found_classes == classes == WNIDS
        for split in "train", "val":
            assert read(found[split]) == read(expected[split])
        assert [label for _, label in found["val"]] == [0, 0, 0, 1, 1, 2, 2]
        for archive in root.glob("*.tar"):
            archive.unlink()


def test_the_devkit_is_read_by_torchvision(layout, tmp_path):
    pytest.importorskip("scipy")
    root = layout("flat val")
    (root / torchvision_imagenet.META_FILE).unlink()
    with pytest.raises(ValueError, match="lacks the classes of val/"):
        find_images(root)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("archives", lambda r: cut(r / TRAIN), f"{TRAIN}.* is corrupted"),
        ("archives", lambda r: (r / VAL).write_bytes(b"<html>" * 999), f"{VAL}.* is corrupted"),
        (
            "archives",
            lambda r: (r / TRAIN).unlink(),
            "no class folders in train/.*as downloaded .*Kaggle",
        ),
        (
            "archives",
            lambda r: (r / VAL).unlink(),
            "no class folders in val/.*as downloaded .*Kaggle",
        ),
        ("flat val", lambda r: shutil.rmtree(r / "train" / WNIDS[1]), "is of no class that train"),
        ("flat val", lambda r: (r / "train/n1.tar").touch(), "n1.tar has not been unpacked"),
        (
            "kaggle",
            lambda r: (r / command.SOLUTION).write_text("ImageId,PredictionString\n"),
            "is of no class that train/ has",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named(layout, name, harm, message):
    root = layout(name)
    harm(root)
    with pytest.raises(ValueError, match=message):
        find_images(root)


def test_imagenet_has_its_classes_in_its_order(tree, tmp_path):
    wnids = ImageNetInfo("imagenet-1k").label_names()
    assert wnids == sorted(wnids) and set(WNIDS) < set(wnids)
    require_imagenet(wnids, tree)
    with pytest.raises(ValueError, match="class 1 is 'n01484850', not 'n01443"):
        require_imagenet([wnids[0], *wnids[2:], wnids[1]], tree)
    with pytest.raises(ValueError, match="has 3 classes. .* need ImageNet-1k's 1000"):
        prepare(tree, tmp_path, imagenet=True, **OPTIONS)


def test_other_numbers_of_images_than_imagenet_s_are_told(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evit.data.folders.require_imagenet", lambda *_: None)
    prepare(tree, tmp_path, imagenet=True, **OPTIONS)
    shown = capsys.readouterr().out
    assert "warning: val has" in shown and "ImageNet-1k has 1281167" in shown


def test_a_thousand_classes_in_words_are_not_data_imagenet(tmp_path):
    for split in "train", "val":
        for label in range(1000):
            (tmp_path / split / f"word {label:03}").mkdir(parents=True)
    with pytest.raises(ValueError, match="class 0 is 'word 000', not .* WordNet ids"):
        module(Folder, tmp_path, num_classes=1000)


def test_training_on_what_is_to_be_prepared_says_so(layout):
    with pytest.raises(ValueError, match="no class folders in train/.*make imagenet ROOT="):
        module(Folder, layout("kaggle"))


def test_a_changed_image_is_prepared_again_and_others_are_not(tree, tmp_path, capsys):
    root = shutil.copytree(tree, tmp_path / "copy")
    prepare(root, tmp_path / "b", **OPTIONS)
    prepare(root, tmp_path / "b", **OPTIONS)
    assert capsys.readouterr().out.count("is there already") == 2
    image = next((root / "val" / WNIDS[0]).iterdir())
    image.write_bytes(image.read_bytes())
    prepare(root, tmp_path / "b", **OPTIONS)
    assert capsys.readouterr().out.count("is there already") == 1


SOURCE = """
import io
import numpy as np
from PIL import Image

class Two(list):
    classes = ["dark", "light"]

def pictures(count):
    for k in range(count):
        image = Image.new("RGB", (20, 30), (90 * k % 250,) * 3)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        yield (image, buffer.getvalue(), np.asarray(image))[k % 3], k % 2

def make_train():
    return Two(pictures(8))

def make_val():
    return Two(pictures(3))

def no_train_classes():
    return [*pictures(3)]

no_val_classes = no_train_classes
"""


def test_a_data_set_in_python_is_a_source(tmp_path, monkeypatch):
    (tmp_path / "own_pictures.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = prepare("own_pictures:make_train", tmp_path / "own", **OPTIONS | dict(mode="raw"))
    data = folder(found, tmp_path, crop_pct=1.0, batch_size=3)
    ((images, labels),) = data.val_dataloader()
    assert data.classes == ["dark", "light"] and labels.tolist() == [0, 1, 0]
    assert images.float().mean((1, 2, 3)).tolist() == [0, 90, 180]
    for source, message in (
        ("own_pictures:nothing_train", "has no attribute 'nothing_train'"),
        ("no_such_pictures:make_train", "No module named 'no_such_pictures'"),
        ("own_pictures:no_train_classes", "need `classes`"),
        ("own_pictures:no_train_classes", "Name the function of train"),
    ):
        with pytest.raises(ValueError, match=f"source={source}: .*{message}"):
            prepare(source, tmp_path / "own", **OPTIONS)
