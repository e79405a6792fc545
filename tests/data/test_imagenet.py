"""ImageNet as it is found: every layout gives the same images, in the same order."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from evit.commands.prepare import prepare
from evit.data import Folder, imagenet
from evit.data.archives import TarMember, tar_members
from evit.data.imagenet import DEVKIT, GROUND_TRUTH, META, find_images, require_imagenet

WNIDS = ["n01440764", "n01443537", "n01484850"]
# The devkit's order, in meta.mat, is not the sorted one, and it knows more than the classes.
SYNSETS = [WNIDS[2], WNIDS[0], WNIDS[1], "n00001740"]
TRUTH = [3, 1, 2, 2, 1, 3, 1]  # the class of each validation image, in the devkit's numbers
OPTIONS = dict(mode="jpg", max_resolution=None, jpeg_quality=95, num_workers=1)


@pytest.fixture(scope="module")
def tree(picture, tmp_path_factory) -> Path:
    """The standard tree: ROOT/train/WNID/WNID_1.JPEG, ROOT/val/WNID/ILSVRC2012_val_00000001.JPEG"""
    root = tmp_path_factory.mktemp("tree") / "imagenet"
    for k in range(10):
        wnid = WNIDS[k % 3]
        path = root / "train" / wnid / f"{wnid}_{k * 7}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k, 40 + k, 50).save(path)
    for number, synset in enumerate(TRUTH, 1):
        path = root / "val" / SYNSETS[synset - 1] / f"ILSVRC2012_val_{number:08}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(100 + number, 50, 40 + number).save(path)
    return root


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    """DEVKIT/data/, as it comes out of its archive."""
    data = tmp_path_factory.mktemp("devkit") / DEVKIT / "data"
    data.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name(META), data)
    (data / GROUND_TRUTH).write_text("".join(f"{synset}\n" for synset in TRUTH))
    return data.parent


def packed(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    # Not in order, as in the archive of the validation images.
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern), reverse=True)}


def pack_train(tree: Path, root: Path) -> None:
    tars = {}
    for wnid in reversed(WNIDS):
        path = packed(root / "class.tar", contents(tree / "train" / wnid, "*"))
        tars[f"{wnid}.tar"] = path.read_bytes()
        path.unlink()
    packed(root / "ILSVRC2012_img_train.tar", tars)


def flatten_val(tree: Path, root: Path) -> None:
    (root / "val").mkdir()
    for path in (tree / "val").glob("*/*"):
        shutil.copy(path, root / "val")


LAYOUTS = ["flat val", "flat val, devkit's files", "flat val, unpacked devkit", "archives", "mixed"]


@pytest.fixture
def layout(tree, devkit, tmp_path):
    def make(name: str) -> Path:
        root = tmp_path / "imagenet"
        root.mkdir()
        if name.startswith("flat"):
            shutil.copytree(tree / "train", root / "train")
            flatten_val(tree, root)
        else:
            pack_train(tree, root)
        if name == "archives":
            packed(root / "ILSVRC2012_img_val.tar", contents(tree / "val", "*/*"))
        if name == "mixed":
            shutil.copytree(tree / "val", root / "val")
        if name.endswith("files"):
            shutil.copytree(devkit / "data", root, dirs_exist_ok=True)
        elif name.endswith("unpacked devkit"):
            shutil.copytree(devkit, root / DEVKIT)
        elif name != "mixed":
            with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as archive:
                archive.add(devkit, DEVKIT)
        return root

    return make


def read(samples):
    return [
        (label, image.read() if isinstance(image, TarMember) else Path(image).read_bytes())
        for image, label in samples
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_images_labels_and_order_of_the_tree(tree, layout, name):
    classes, expected = find_images(tree)
    found_classes, found = find_images(layout(name))
    assert found_classes == classes == WNIDS
    for split in "train", "val":
        assert read(found[split]) == read(expected[split])
    assert [label for _, label in found["val"]] == [0, 0, 1, 1, 2, 2, 2]


def test_archives_become_the_very_files_that_the_tree_becomes(tree, layout, tmp_path):
    first = prepare(tree, tmp_path / "a", **OPTIONS)
    second = prepare(layout("archives"), tmp_path / "b", **OPTIONS)
    for split in "train", "val":
        assert (first / f"{split}.beton").read_bytes() == (second / f"{split}.beton").read_bytes()


def test_label_maps_of_images_in_an_archive_are_found_by_class_and_name(layout, tmp_path):
    root = layout("archives")
    with pytest.raises(ValueError, match="10 of 10 .*maps/n01440764/n01440764_0.pt"):
        prepare(root, tmp_path / "b", label_maps=tmp_path / "maps", **OPTIONS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("archives", lambda r: (r / f"{DEVKIT}.tar.gz").unlink(), f"missing. Put {DEVKIT}.tar.gz"),
        ("archives", lambda r: cut(r / f"{DEVKIT}.tar.gz"), f"{DEVKIT}.tar.gz is damaged"),
        ("archives", lambda r: cut(r / "ILSVRC2012_img_train.tar"), "_train.tar is not a whole"),
        (
            "archives",
            lambda r: (r / "ILSVRC2012_img_val.tar").write_bytes(b"<html>" * 999),
            "_val.tar is not a whole",
        ),
        (
            "archives",
            lambda r: packed(r / "ILSVRC2012_img_val.tar", {"README": b"none"}),
            "holds no images",
        ),
        (
            "archives",
            lambda r: (r / "ILSVRC2012_img_train.tar").unlink(),
            "neither train/CLASS/.* nor ILSVRC2012_img_train.tar",
        ),
        (
            "archives",
            lambda r: (r / "ILSVRC2012_img_val.tar").unlink(),
            "neither val/CLASS/.* nor ILSVRC2012_img_val.tar",
        ),
        ("flat val, devkit's files", lambda r: (r / GROUND_TRUTH).write_text("1\n2\n"), "to _0000"),
        (
            "flat val, devkit's files",
            lambda r: (r / GROUND_TRUTH).write_text("9\n" * 7),
            "cannot be understood",
        ),
        ("flat val, devkit's files", lambda r: (r / META).write_text("?"), "cannot be understood"),
        ("flat val", lambda r: shutil.rmtree(r / "train" / WNIDS[1]), f"train lacks: {WNIDS[1]}"),
        ("mixed", lambda r: (r / "val" / "n09999999").mkdir(), "train lacks: n09999999"),
    ],
)
def test_what_is_missing_or_damaged_is_named(layout, name, harm, message):
    root = layout(name)
    harm(root)
    with pytest.raises(ValueError, match=message):
        find_images(root)


def test_an_empty_folder_is_told_what_it_may_hold(tmp_path):
    with pytest.raises(ValueError, match="no train/.*ILSVRC2012_img_train.tar.*devkit_t12.tar.gz"):
        find_images(tmp_path)


def test_imagenet_has_its_classes_in_its_order(tree, tmp_path):
    wnids = ImageNetInfo("imagenet-1k").label_names()
    assert wnids == sorted(wnids) and set(WNIDS) < set(wnids)
    require_imagenet(wnids, tree)
    with pytest.raises(ValueError, match="class 1 is 'n01484850', where ImageNet-1k has 'n01443"):
        require_imagenet([wnids[0], *wnids[2:], wnids[1]], tree)
    with pytest.raises(ValueError, match="has 3 classes, not 1000"):
        prepare(tree, tmp_path, imagenet=True, **OPTIONS)


def test_a_thousand_classes_in_words_are_not_data_imagenet(tmp_path):
    for split in "train", "val":
        for label in range(1000):
            (tmp_path / split / f"word {label:03}").mkdir(parents=True)
    with pytest.raises(ValueError, match="class 0 is 'word 000', where .* WordNet ids"):
        Folder(tmp_path, num_classes=1000, img_size=28, batch_size=1)


def test_training_on_archives_is_told_to_prepare_them(layout):
    with pytest.raises(ValueError, match="has no train/.*make imagenet ROOT="):
        Folder(layout("archives"), img_size=28, batch_size=1)


def test_other_numbers_of_images_are_told(monkeypatch):
    samples = {"train": [("a", 0)], "val": [("b", 0)] * 50 + [("c", 1)] * 49}
    train, val, each = imagenet.strange_counts(["x", "y"], samples)
    assert train == "train has 1 images, ImageNet-1k has 1281167" and val.startswith("val has 99")
    assert "1 classes have more or fewer, y has 49" in each
    samples = {"train": [("a", 0)] * 3, "val": [("b", 0)] * 50}
    monkeypatch.setattr(imagenet, "NUM_IMAGES", {"train": 3, "val": 50})
    assert imagenet.strange_counts(["x"], samples) == []


def test_a_member_that_the_archive_has_lost_is_not_read_short(tree, layout):
    path = layout("archives") / "ILSVRC2012_img_val.tar"
    members = list(tar_members(path))
    cut(path)
    with pytest.raises(OSError, match="ends within it"):
        [member.read() for member in members]
