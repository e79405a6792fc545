"""Label maps in .beton files and in training batches."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evit
from evit.commands.prepare import prepare
from evit.config import Recipe
from evit.data import FashionMNIST, Folder, auto
from evit.data import ffcv as beton
from evit.data.ffcv import BetonError, augment, sidecar_path
from evit.data.ffcv.write import write_beton
from evit.data.order import choose_samples
from evit.training.losses import make_objective
from tests.conftest import write_photos
from tests.data import build
from tests.data.build import stream
from tests.data.test_beton import table

CLASSES = ["a", "b", "c"]
SHAPE = (3, 4)
OPTIONS = dict(img_size=28, batch_size=4, crop_pct=1.0)


def map_of(k, num_classes=3, shape=SHAPE):
    rng = np.random.default_rng(k)
    logits = rng.normal(0, 4, (5, *shape))
    return torch.tensor(np.stack([logits, rng.integers(0, num_classes, (5, *shape))])).half()


@pytest.fixture(scope="module")
def maps(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    for k in range(len(samples)):
        torch.save(map_of(k), folder / f"{k}.pt")
    return [str(folder / f"{k}.pt") for k in range(len(samples))]


def write(path, samples, maps, **options):
    options = dict(classes=CLASSES, source="test", num_workers=2) | options
    return write_beton(path, samples, label_maps=maps, **options)


@pytest.fixture(scope="module")
def mapped(samples, maps, tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "train.beton"
    write(path, samples, maps)
    return path


@pytest.fixture
def copied(mapped, tmp_path):
    path = tmp_path / "copy.beton"
    shutil.copy(mapped, path)
    shutil.copy(sidecar_path(mapped), sidecar_path(path))
    return path


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_map_is_named_when_it_is_read(copied, which):
    content = bytearray(copied.read_bytes())
    ptr, size = np.frombuffer(content, beton.ALLOCATION, offset=table(copied))[["ptr", "size"]][35]
    place = int(ptr) + int(size) // 2 if which else int(ptr)  # a class, or a logit
    content[place : place + 2] = np.float16([np.nan, 3][which]).tobytes()
    copied.write_bytes(content)
    with pytest.raises(BetonError, match="copy.beton: the label map of sample 17 is damaged"):
        list(stream(copied, batch_size=71))
    assert len(list(stream(copied, train=False))) == 9  # which needs no maps


def test_a_map_of_another_shape_is_named_and_nothing_is_left_behind(samples, maps, tmp_path):
    odd = tmp_path / "odd.pt"
    torch.save(map_of(0, shape=(4, 3)), odd)
    with pytest.raises(
        ValueError, match="odd.pt cannot be read .*5, 4, 3\\), not float16 \\(2, 5, 3, 4\\)"
    ):
        write(tmp_path / "new/x.beton", samples, [*maps[:70], str(odd)])
    assert list((tmp_path / "new").iterdir()) == []


def test_images_that_are_skipped_do_not_shift_the_maps(samples, maps, tmp_path):
    some = [(tmp_path / "missing.jpg", 0) if k in (1, 4) else samples[k] for k in range(6)]
    write(tmp_path / "x.beton", some, maps[:6], skip_bad=True)
    one = stream(tmp_path / "x.beton", batch_size=4)
    ((_, labels, found, _),) = one
    kept = [[0, 2, 3, 5][k] for k in one.samples()]
    assert torch.equal(found, torch.stack([map_of(k) for k in kept]))
    assert labels.tolist() == [k % 3 for k in kept]


def test_training_batches_hold_the_maps_of_their_images(mapped):
    one = stream(mapped)
    assert one.label_map_shape == SHAPE
    batches = list(one)
    images, labels, found, crops = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.dtype == torch.uint8 and labels.tolist() == [k % 3 for k in one.samples()]
    assert torch.equal(found, torch.stack([map_of(k) for k in one.samples()]))
    assert crops.shape == (64, 5) and crops.dtype == torch.float32


def test_batches_with_maps_depend_on_seed_epoch_and_rank_alone(mapped):
    def third(**options):
        one = stream(mapped, world_size=2, batch_size=4, **options)
        if options.get("rank"):
            list(one)  # an epoch before
        one.set_epoch(2)
        return [torch.cat([batch[part] for batch in one]) for part in (2, 3)]

    ranks = [third(rank=rank, num_workers=2) for rank in range(2)]
    for rank in range(2):
        assert all(map(torch.equal, ranks[rank], third(rank=rank, num_workers=1)))
    seen = [{one.numpy().tobytes() for one in found} for found, _ in ranks]
    assert [len(maps) for maps in seen] == [32, 32] and not seen[0] & seen[1]


def test_images_are_the_same_with_and_without_maps(mapped, written):
    for with_maps, without in zip(stream(mapped), stream(written), strict=True):
        assert torch.equal(with_maps[0], without[0])


def gradients(folder, sides):
    """Images whose red grows from 0 to 255 to the right, and green downwards."""
    folder.mkdir(parents=True)
    for k, (width, height) in enumerate(sides):
        x, y = (np.arange(n) + 0.5 for n in (width, height))
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.rint(255 * x / width)
        pixels[..., 1] = np.rint(255 * y / height)[:, None]
        Image.fromarray(pixels).save(folder / f"{k:02}.png")
    return folder


def shown_crops(images):
    """Crops as the pixels of such images show them."""
    red, green = images[:, 0].float().mean(1) / 255, images[:, 1].float().mean(2) / 255
    mirrored = red[:, 0] > red[:, -1]
    red = torch.where(mirrored[:, None], red.flip(1), red)
    found = []
    for shades in red, green:
        half = (shades[:, -1] - shades[:, 0]) / (shades.shape[1] - 1) / 2
        found.append((shades[:, 0] - half, shades[:, -1] + half))
    (x0, x1), (y0, y1) = found
    return torch.stack([x0, y0, x1, y1, mirrored.float()], 1)


@pytest.mark.parametrize("backend", ["ffcv", "imagefolder"])
def test_the_crops_are_what_the_pixels_show(tmp_path, backend):
    sides = [(200 + 10 * k, 300 - 8 * k) for k in range(16)]
    for split in "train", "val":
        gradients(tmp_path / "tree" / split / "a", sides)
    (tmp_path / "maps/a").mkdir(parents=True)
    for k in range(16):
        torch.save(map_of(k, 1), tmp_path / f"maps/a/{k:02}.pt")
    data = build.folder(
        tmp_path / "tree", tmp_path / "cache", img_size=40, batch_size=16, backend=backend,
        mode="raw", num_workers=0, label_maps=tmp_path / "maps",
    )  # fmt: skip
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        ((images, _, _, crops),) = loader
        assert set(crops[:, 4].tolist()) == {0.0, 1.0}
        assert (crops[:, 2:4] - crops[:, :2] > 0.1).all()
        # A pixel that comes out covers up to 8 of the source.
        torch.testing.assert_close(shown_crops(images), crops, atol=0.03, rtol=0)


def test_the_warps_are_what_the_pixels_show(tmp_path, monkeypatch):
    """From shown pixels over the warp, the mirror and the crop to a place in the image."""
    folder = gradients(tmp_path / "a", [(200, 200)] * 12)
    torch.save(map_of(0, 1), tmp_path / "map.pt")
    samples = [(path, 0) for path in sorted(folder.iterdir())]
    write(tmp_path / "x.beton", samples, [str(tmp_path / "map.pt")] * 12, classes=["a"], mode="raw")
    one = stream(tmp_path / "x.beton", img_size=64, batch_size=12, rand_augment="rand-inc1")
    geometric = np.array([3, 11, 12, 13, 14, -1])

    def draw(seeds):
        rng = np.random.default_rng(1)
        operations = rng.choice(geometric, (len(seeds), 2))
        limits = np.where(operations == 3, 20, 0.15)
        return operations, rng.uniform(-limits, limits)

    monkeypatch.setattr(augment, "draw", lambda seeds, *_: draw(seeds))
    ((images, _, _, crops, warps),) = one
    assert warps.shape == (12, 2, 3) and warps.dtype == torch.float32
    centres = (torch.arange(64) + 0.5) / 64
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    place = torch.einsum("bij,jyx->biyx", warps, torch.stack([x, y, torch.ones_like(x)]))
    inside = ((place > 0.06) & (place < 0.94)).all(1)
    x0, y0, x1, y1, mirrored = (crops[:, k].view(-1, 1, 1) for k in range(5))
    x, y = place.unbind(1)
    x = torch.where(mirrored.bool(), 1 - x, x)
    expected = torch.stack([x0 + (x1 - x0) * x, y0 + (y1 - y0) * y], 1)
    error = (images[:, :2] / 255 - expected).abs().amax(1)
    assert inside.float().mean() > 0.6
    assert error[inside].quantile(0.95) < 0.02  # the rest was outside in between


@pytest.mark.parametrize("backend", ["ffcv", "imagefolder"])
def test_both_backends_give_warps_with_rand_augment(labelled, tmp_path, backend):
    options = dict(label_maps=labelled[1], backend=backend, num_workers=0, img_size=32)
    data = folder(labelled[0], tmp_path, rand_augment="rand-m9-p1-inc1", **options)
    batches = list(data.train_dataloader())
    warps = torch.cat([warps for *_, warps in batches])
    assert warps.shape == (12, 2, 3) and warps.dtype == torch.float32
    moved = (warps != torch.eye(2, 3)).flatten(1).any(1)
    assert 0 < moved.sum() < 12
    sizes = dict(img_size=32, embed_dim=24, depth=4, num_heads=2, num_classes=2, keep_rate=1.0)
    model = evit.LVViT(**sizes)
    recipe = Recipe(epochs=1, batch_size=4, lr=1e-3)
    loss = make_objective(model, recipe, 2, 4, label_maps=True)
    assert torch.isfinite(loss(*data.on_after_batch_transfer(batches[0], 0))["loss"])


@pytest.fixture
def labelled(tmp_path):
    """(a tree of photos, the folder of its label maps)"""
    tree = write_photos(tmp_path / "photos")
    for k, path in enumerate(sorted((tree / "train").glob("*/*.jpg"))):
        target = tmp_path / "maps" / path.parent.name / f"{path.stem}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(map_of(k, 2), target)
    return tree, tmp_path / "maps"


def folder(tree, tmp_path, **options):
    return build.folder(tree, tmp_path / "cache", **OPTIONS | options)


@pytest.mark.parametrize("limit", [None, 8])
def test_both_backends_give_every_image_its_own_map(labelled, tmp_path, limit):
    tree, maps = labelled
    chosen = choose_samples(12, limit).tolist()
    expected = {map_of(k, 2).numpy().tobytes(): k // 6 for k in chosen}
    options = dict(label_maps=maps, num_workers=0, max_train_images=limit)
    for backend in "ffcv", "imagefolder":
        data = folder(tree, tmp_path, backend=backend, **options)
        seen = {
            one.numpy().tobytes(): int(label)
            for _, labels, found, _ in data.train_dataloader()
            for label, one in zip(labels, found, strict=True)
        }
        assert seen == expected
        assert len(next(iter(data.val_dataloader()))) == 2


def test_files_with_other_maps_or_none_have_folders_of_their_own(labelled, tmp_path):
    tree, maps = labelled
    folders = [build.module(Folder, tree, **OPTIONS, label_maps=m).beton_dir for m in (None, maps)]
    torch.save(torch.zeros(2, 5, 9, 9).half(), maps / "cat/0.pt")
    folders.append(build.module(Folder, tree, **OPTIONS, label_maps=maps).beton_dir)
    assert len(set(folders)) == 3


@pytest.mark.parametrize("backend", ["ffcv", "imagefolder"])
def test_a_missing_map_is_named_before_training(labelled, tmp_path, backend):
    tree, maps = labelled
    (maps / "dog/3.pt").unlink()
    with pytest.raises(ValueError, match="1 of 12 training images have no label map, .*dog/3.pt"):
        folder(tree, tmp_path, label_maps=maps, backend=backend)


def test_a_prepared_folder_brings_its_maps(labelled, tmp_path):
    tree, maps = labelled
    ready = prepare(tree, tmp_path / "ready", num_workers=1, label_maps=maps)
    data = folder(ready, tmp_path)
    assert data.train_dataloader().label_map_shape == SHAPE
    assert [len(batch) for batch in data.train_dataloader()] == [4, 4, 4]


def test_maps_for_a_prepared_folder_without_them_are_refused(labelled, tmp_path):
    tree, maps = labelled
    ready = prepare(tree, tmp_path / "ready", num_workers=1)
    with pytest.raises(ValueError, match="train.beton has no label maps.*src/prepare.py"):
        build.module(Folder, ready, **OPTIONS, label_maps=maps)


@pytest.mark.parametrize("make", [FashionMNIST, auto])
def test_fashion_mnist_has_no_label_maps(make, tmp_path):
    with pytest.raises(ValueError, match="fashion-mnist has no label maps.*data.root=DIR"):
        build.module(make, **OPTIONS, label_maps=tmp_path)
