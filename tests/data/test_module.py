"""The data modules: what they refuse, and the two backends side by side."""

import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from evit.commands.prepare import prepare
from evit.data import Folder, auto, ffcv
from evit.data.batch import augment_batch, denormalize, make_mixup, normalize
from evit.data.ffcv import HEADER, BetonError, layout
from evit.data.folders import class_samples, tree_classes
from evit.data.imagefolder import FolderLoader
from evit.data.order import Shard, repeated_order
from tests.conftest import ROOT
from tests.data import build

OPTIONS = dict(img_size=28, batch_size=4, crop_pct=1.0)


def folder(photos, tmp_path, **options):
    return build.folder(photos, tmp_path / "cache", **OPTIONS | options)


@pytest.mark.parametrize("splits", [("train", "val"), ("val",)])
def test_prepared_files_are_checked_before_anything_else(photos, tmp_path, splits):
    root = prepare(photos, tmp_path / "betons", mode="raw", max_resolution=None)
    fields, metadata = layout()
    content = bytearray((root / "val.beton").read_bytes())
    content[HEADER.itemsize + fields.nbytes + metadata.fields["f1"][1]] ^= 1  # the first label
    (root / "val.beton").write_bytes(content)
    with pytest.raises(BetonError, match="betons/val.beton: damaged, or not the file of its side"):
        build.module(Folder, root, **OPTIONS, splits=splits)


def test_betons_are_opened_in_one_place_which_checks_them():
    found = {path: path.read_text() for path in (ROOT / "src").rglob("*.py")}
    opened = [path.name for path, text in found.items() if "memmap(" in text]
    assert opened == ["__init__.py"]
    from_ffcv = [path.name for path, text in found.items() if re.search("(from|import) ffcv", text)]
    assert from_ffcv == ["__init__.py"]


def test_a_changed_folder_or_another_way_of_writing_gets_files_of_its_own(
    photos, tmp_path, monkeypatch
):
    folders = [folder(photos, tmp_path).beton_dir]
    folders.append(folder(photos, tmp_path, jpeg_quality=50).beton_dir)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(photos / "train/cat/new.jpg")
    folders.append(folder(photos, tmp_path).beton_dir)
    monkeypatch.setattr(ffcv, "SIDECAR_FORMAT", "of another version")
    cache_dir = tmp_path / "cache"
    folders.append(build.module(Folder, photos, cache_dir=cache_dir, **OPTIONS).beton_dir)
    assert len(set(folders)) == 4


def test_labels_are_those_of_train_where_val_lacks_a_class(photos):
    for path in (photos / "val/cat").iterdir():
        path.unlink()
    (photos / "val/cat").rmdir()
    found = class_samples(photos / "val", tree_classes(photos))
    assert {label for _, label in found} == {1}


@pytest.mark.parametrize("backend", ["ffcv", "imagefolder"])
def test_without_val_a_share_of_each_class_is_held_out(photos, tmp_path, backend):
    shutil.rmtree(photos / "val")
    options = dict(backend=backend, num_workers=0, val_fraction=0.3)
    data = folder(photos, tmp_path, **options)
    split = {name: {path for path, _ in data.samples(name)} for name in ("train", "val")}
    assert len(split["train"]) == 8 and len(split["val"]) == 4  # of 6 images of a class 2
    assert not split["train"] & split["val"]
    seen = [label for _, labels, *_ in data.val_dataloader() for label in labels.tolist()]
    assert sorted(seen) == [0, 0, 1, 1]
    again = folder(photos, tmp_path, **options, seed=7, splits=["val"])
    assert {path for path, _ in again.samples("val")} == split["val"]
    other = folder(photos, tmp_path, **options | dict(val_fraction=0.5))
    assert len(other.samples("val")) == 6
    assert backend == "imagefolder" or other.beton_dir != data.beton_dir


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (None, "has no class folders in val/: .*data.val_fraction=0.1 holds out some of train/"),
        (0.99, "data.val_fraction=0.99 leaves none, or all, of 6 images of a class"),
        (1.5, "data.val_fraction=1.5 leaves none, or all"),
    ],
)
def test_a_share_that_cannot_be_held_out_is_refused(photos, tmp_path, share, message):
    shutil.rmtree(photos / "val")
    with pytest.raises(ValueError, match=message):
        folder(photos, tmp_path, val_fraction=share)


def test_nothing_is_held_out_beside_validation_images(photos, tmp_path):
    with pytest.raises(ValueError, match="photos has validation images: leave out data.val_frac"):
        folder(photos, tmp_path, val_fraction=0.3)
    with pytest.raises(ValueError, match="data.val_fraction=0.3 is of a folder"):
        build.module(auto, **OPTIONS, val_fraction=0.3)


def test_auto_takes_the_folder_or_says_that_it_has_none(photos, capsys):
    assert build.module(auto, photos, **OPTIONS).name == "photos"
    assert capsys.readouterr().out == ""
    assert build.module(auto, **OPTIONS).name == "fashion-mnist"
    assert "embedded Fashion-MNIST" in capsys.readouterr().out


@pytest.mark.parametrize("options", [dict(backend="dali"), dict(batches_ahead=0)])
def test_a_backend_or_a_number_of_batches_that_is_none_is_refused(options, photos):
    with pytest.raises(ValueError, match="data.backend must be ffcv or imagefolder and data.batch"):
        build.module(Folder, photos, **OPTIONS, **options)


def test_missing_ffcv_is_named_with_the_way_out(photos, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "evit.data.ffcv.decode", None)
    monkeypatch.delattr("evit.data.ffcv.decode", raising=False)
    with pytest.raises(ValueError, match="data.backend=imagefolder"):
        build.module(Folder, photos, **OPTIONS)
    build.module(Folder, photos, backend="imagefolder", **OPTIONS)


def loader(photos, train=True, rank=0, world_size=1, seed=0, **options):
    samples = class_samples(photos / ("train" if train else "val"), ["cat", "dog"])
    knobs, rest = build.apart(dict(crop_scale=[0.5, 1.0], crop_pct=1.0) | options)
    size = knobs.pop("batch_size", 4)
    recipe = build.recipe_of(**knobs, batch_size=size * world_size)
    rest = dict(img_size=28, num_workers=0) | rest
    shard = Shard(rank, world_size, size, seed)
    return FolderLoader(samples, recipe=recipe, shard=shard, train=train, **rest)


def epoch(loader, number=0):
    loader.set_epoch(number)
    return torch.cat([images for images, _ in loader])


AUGMENTED = dict(rand_augment="rand-m9-mstd0.5-p1-inc1", fill=(124, 116, 104))


def test_imagefolder_batches_depend_on_seed_and_epoch_alone(photos):
    one = loader(photos, **AUGMENTED)
    first, later = epoch(one), epoch(one, 1)  # whose draws have moved the global generators
    for again in one, loader(photos, **AUGMENTED), loader(photos, num_workers=2, **AUGMENTED):
        assert torch.equal(first, epoch(again)) and torch.equal(later, epoch(again, 1))
    for other in later, epoch(loader(photos, seed=1, **AUGMENTED)):
        pictures = [{image.numpy().tobytes() for image in images} for images in (first, other)]
        assert not pictures[0] & pictures[1]


def test_imagefolder_augments_crops_that_stay_the_same(photos):
    plain, augmented = epoch(loader(photos)), epoch(loader(photos, **AUGMENTED))
    assert torch.equal(augmented, epoch(loader(photos, **AUGMENTED, num_workers=2)))
    assert (plain != augmented).flatten(1).any(1).float().mean() > 0.8
    nothing = dict(rand_augment="rand-p0-inc1")
    assert torch.equal(plain, epoch(loader(photos, **nothing)))


def test_imagefolder_repeats_deits_views_and_each_differs(photos):
    options = dict(repeated_augmentations=3, world_size=2, batch_size=2)
    ranks = [loader(photos, rank=r, **options) for r in range(2)]
    keys = []
    for one in ranks:
        one.set_epoch(5)
        list(one)
        keys.append(list(map(tuple, one.keys)))
    both = [key for pair in zip(*keys, strict=True) for key in pair]
    assert [index for _, index, _ in both] == repeated_order(12, 3, 5).tolist()
    ranks[1].load_state_dict(dict(position=1, length=3))  # goes on in the middle of an epoch
    later = list(ranks[1])
    assert list(map(tuple, ranks[1].keys)) == keys[1][2:] and len(later) == 2
    views = {image.numpy().tobytes() for image in epoch(loader(photos, repeated_augmentations=3))}
    assert len(views) == 12


@pytest.mark.parametrize("max_samples", [None, 1, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_imagefolder_ranks_evaluate_every_image_once(photos, world_size, max_samples):
    options = dict(world_size=world_size, max_val_images=max_samples, batch_size=2)
    ranks = [loader(photos, False, rank=r, **options) for r in range(world_size)]
    count = max_samples or 6
    shown = sorted(i for rank in ranks for i in rank.own(rank.order(0)).tolist())
    assert shown == list(range(count))
    for number, rank in enumerate(ranks):
        sizes = [len(images) for images, _ in rank]
        own = len(range(number, count, world_size))
        assert sum(sizes) == own and len(sizes) == len(rank) == max(-(-own // 2), 1)


@pytest.mark.parametrize("backend", ["ffcv", "imagefolder"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_batch_tells_which_images_it_has(backend, repeats, photos, tmp_path):
    options = dict(
        backend=backend, max_train_images=9, repeated_augmentations=repeats, num_workers=1
    )
    data = folder(photos, tmp_path, **options)
    train = data.train_dataloader()
    train.set_epoch(2)
    for number, (_, labels) in enumerate(train):
        told = re.findall(r"\d+", data.describe_batch(2, number).split(" of ")[0])
        assert [int(number) // 6 for number in told] == labels.tolist()
    assert ("train.beton" in data.describe_batch(2, 0)) == (backend == "ffcv")


@pytest.mark.parametrize("size", [8, 12])
def test_of_a_batch_at_most_8_images_are_told(photos, tmp_path, size):
    data = folder(photos, tmp_path, backend="imagefolder", batch_size=size, num_workers=0)
    told = data.describe_batch(0, 0).split(" of ")[0]
    assert len(re.findall(r"\d+", told)) == 8 and ("..." in told) == (size > 8)


def test_denormalize_undoes_normalize():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(denormalize(normalize(images)), images)


def test_images_are_normalised_as_timm_says_that_the_model_wants_them(shared_photos):
    data = build.module(Folder, shared_photos, img_size=8, batch_size=2)
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(1)
    ours = data.on_after_batch_transfer(white, 0)[0]
    data.normalize_for(timm.create_model("vit_tiny_patch16_224.augreg_in21k"))
    theirs = data.on_after_batch_transfer(white, 0)[0]
    assert ours[0, 0, 0, 0] == pytest.approx((1 - 0.485) / 0.229, abs=1e-4)
    assert (theirs == 1).all()  # mean and deviation 0.5


@pytest.mark.parametrize("split", ["train", "val"])
def test_augmentation_reaches_both_backends_and_only_training(photos, tmp_path, split):
    options = dict(rand_augment="rand-m9-p1-inc1", flip=0.0, crop_scale=(1.0, 1.0), num_workers=0)
    for backend in "ffcv", "imagefolder":
        with_and_without = []
        for knobs in options, options | dict(rand_augment=None):
            data = folder(photos, tmp_path, batch_size=6, backend=backend, **knobs)
            data.setup()
            batches = data.train_dataloader() if split == "train" else data.val_dataloader()
            with_and_without.append(torch.cat([images for images, _ in batches]))
        assert torch.equal(*with_and_without) == (split == "val")


def test_what_rand_augment_uncovers_has_the_mean_of_the_normalisation(photos, tmp_path):
    data = build.module(Folder, photos, **OPTIONS, cache_dir=tmp_path, rand_augment="rand-inc1")
    data.normalize_for(timm.create_model("vit_tiny_patch16_224.augreg_in21k"))
    data.prepare_data()
    data.setup()
    assert data.train_dataloader().fill == (128, 128, 128)


def test_a_rand_augment_that_is_not_served_is_refused_at_once(photos):
    with pytest.raises(ValueError, match="recipe.rand_augment='rand-m9'"):
        build.module(Folder, photos, **OPTIONS, rand_augment="rand-m9")


def test_random_erasing_is_timm_s():
    options = dict(is_training=True, re_prob=0.25, re_mode="pixel")
    *_, theirs = timm.data.create_transform(32, **options).transforms
    found = []
    for erase in (lambda x: augment_batch(x, 7, random_erasing=0.25)[0]), theirs:
        random.seed(0)
        torch.manual_seed(0)
        found.append(erase(torch.full((600, 3, 32, 32), 9.0)))
    assert torch.equal(*found)
    areas = (found[0] != 9).all(1).float().mean((1, 2))
    erased = areas[areas > 0]
    assert len(erased) / 600 == pytest.approx(0.25, abs=0.05)
    assert 0.01 < erased.min() < 0.05 and 0.28 < erased.max() < 0.36
    assert augment_batch(found[0], 7)[0] is found[0] and augment_batch(found[0], 7)[1] == 7


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_gives_soft_targets_that_sum_to_one(mode):
    mixup = make_mixup(
        build.recipe_of(mixup=0.8, cutmix=1.0, label_smoothing=0.1, mixup_mode=mode), 5, 8
    )
    images, targets = mixup(torch.randn(8, 3, 16, 16), torch.arange(8) % 2)
    assert targets.shape == (8, 5)
    assert len(set(targets[1::2, 1].tolist())) == dict(batch=1, pair=4, elem=4)[mode]
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert targets.min() >= 0.1 / 5 - 1e-6


def test_mixup_off_is_none_and_odd_batches_are_refused_only_where_they_mix():
    assert make_mixup(build.recipe_of(), 5, 7) is None
    with pytest.raises(ValueError, match="7 images per process is odd"):
        make_mixup(build.recipe_of(mixup=0.8), 5, 7)


@pytest.mark.parametrize("backend", ["ffcv", "imagefolder"])
@pytest.mark.parametrize(("accumulated", "used"), [(1, 6), (2, 6), (4, 4)])
def test_an_epoch_is_of_whole_steps(accumulated, used, backend, photos, tmp_path):
    options = OPTIONS | dict(batch_size=2 * accumulated)
    data = build.module(Folder, photos, cache_dir=tmp_path, backend=backend, **options)
    data.prepare_data()
    data.trainer = one_process(accumulated)
    data.setup()
    loader = data.train_dataloader()
    assert len(loader) == len(list(loader)) == used


@pytest.mark.parametrize("backend", ["ffcv", "imagefolder"])
def test_images_that_do_not_fill_a_step_are_refused(backend, photos, tmp_path):
    options = OPTIONS | dict(batch_size=14)
    data = build.module(Folder, photos, cache_dir=tmp_path, backend=backend, **options)
    data.prepare_data()
    reasons = {
        7: "12 training images do not fill one batch of 2 x 7 on 1 processes: lower recipe.batch_s",
        4: "recipe.batch_size=14 must be a multiple of .*, 4",
    }
    for accumulated, reason in reasons.items():
        data.trainer = one_process(accumulated)
        with pytest.raises(ValueError, match=reason):
            data.setup()


def one_process(accumulated: int) -> SimpleNamespace:
    """What the data module asks a trainer for."""
    return SimpleNamespace(
        accumulate_grad_batches=accumulated,
        global_rank=0,
        world_size=1,
        num_nodes=1,
    )
