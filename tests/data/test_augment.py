"""The compiled operations beside timm's and torchvision's on PIL images; how they are drawn."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from evit.data.batch import PILRandAugment, parse_rand_augment, source_of, warp_of
from evit.data.ffcv.augment import NOTHING, apply_operation, argument_of, draw
from evit.data.order import repeated_order
from tests.data import build
from tests.data.test_pixels import photo

DEIT = "rand-m9-mstd0.5-inc1"
OPERATIONS = auto_augment._RAND_INCREASING_TRANSFORMS
FILL = (124, 116, 104)
GEOMETRIC = (3, 11, 12, 13, 14)


def images():
    """Noise, a photo's spectrum, few colours, one colour, and the sizes at which borders meet."""
    rng = np.random.default_rng(0)
    yield rng.integers(0, 256, (37, 52, 3), dtype=np.uint8)
    yield photo(1, 61, 48)
    yield photo(2, 96, 96) // 4 + 90  # little contrast
    yield np.repeat(rng.integers(0, 2, (40, 40, 1), dtype=np.uint8) * 255, 3, 2)
    yield np.full((16, 24, 3), (7, 130, 255), np.uint8)
    yield rng.integers(0, 256, (5, 3, 3), dtype=np.uint8)
    yield rng.integers(0, 256, (1, 1, 3), dtype=np.uint8)


def applied(pixels, *steps, fill=FILL):
    found = pixels.copy()
    for operation, argument in steps:
        affine = source_of(operation, argument, float(found.shape[1]), float(found.shape[0]))
        apply_operation(found, operation, float(argument), affine, np.array(fill))
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_timm_s_pixels_at_timm_s_arguments(name, monkeypatch):
    operation = OPERATIONS.index(name)
    for level in (0.0, 0.31, 2.7, 4.99, 7.5, 8.4, 9.0, 9.77, 10.0):
        for sign in 1.0, -1.0:
            monkeypatch.setattr(random, "random", lambda sign=sign: 0.75 - sign / 2)
            to_arguments = auto_augment.LEVEL_TO_ARG[name]
            arguments = to_arguments(level, {}) if to_arguments else ()
            found = argument_of(operation, level, sign)
            assert [found] == list(arguments or (0.0,))
            for pixels in images():
                image = Image.fromarray(pixels)
                theirs = auto_augment.NAME_TO_OP[name](
                    image, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC
                )
                assert np.array_equal(applied(pixels, (operation, found)), theirs)


def drawn_by_timm(config, count):
    """(count, layers) operations and arguments."""
    random.seed(1)
    np.random.seed(1)
    augment = PILRandAugment(config, FILL)
    draws = []
    for op in augment.transform.ops:
        op.aug_fn = lambda image, *arguments, op=op, **_: draws.append((op.name, *arguments))
    names = {op.name: k for k, op in enumerate(augment.transform.ops)}
    for _ in range(count):
        augment.transform(None)
    return [(names[name], *(arguments or (0.0,))) for name, *arguments in draws]


@pytest.mark.parametrize(
    "config", [DEIT, "rand-m5-n3-p0.8-mstd2-inc1", "rand-m7-mstd101-inc1", "rand-m12-mmax15-inc1"]
)
def test_operations_and_arguments_are_distributed_as_timm_s(config):
    count = 12_000
    seeds = np.random.default_rng(0).integers(2**32, size=count)
    operations, arguments = draw(seeds.astype(np.uint32), *parse_rand_augment(config))
    theirs = np.array(drawn_by_timm(config, count))
    total, expected = (operations != NOTHING).sum(), len(theirs)
    assert abs(total - expected) < 0.03 * expected
    for operation in range(len(OPERATIONS)):
        ours = arguments[operations == operation]
        timms = theirs[theirs[:, 0] == operation, 1]
        assert abs(len(ours) - len(timms)) < 0.2 * len(timms)
        places = np.union1d(ours, timms) + 1e-9
        below = [np.searchsorted(np.sort(a), places) / len(a) for a in (ours, timms)]
        assert np.abs(below[0] - below[1]).max() < 0.09  # Kolmogorov and Smirnov's distance


@pytest.mark.parametrize(
    "config",
    ["", "rand", "rand-m9-mstd0.5", "rand-m9-inc0", "rand-m9-inc1-tweights", "rand-m-inc1"]
    + ["original-mstd0.5", "augmix-m5", "3a", "rand-m9-inc1-x3", "rand-m9-inc1 ", "rand-m9.5-inc1"]
    + ["rand-p.5-inc1", "rand-n0-inc1"],
)
def test_what_is_not_served_is_named(config):
    with pytest.raises(ValueError, match=f"recipe.rand_augment={config!r}: write it as timm"):
        parse_rand_augment(config)


def places(width, height):
    """An image whose red and green say where a pixel is: 50 to 250 of the width and height."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.rint(50 + 200 * (np.arange(width) + 0.5) / width)
    pixels[..., 1] = np.rint(50 + 200 * (np.arange(height) + 0.5) / height)[:, None]
    return pixels


def moved(warp, size):
    """Where each pixel of a square image of this size comes from (size, size, 2)."""
    centres = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    return np.stack([warp[k, 0] * x + warp[k, 1] * y + warp[k, 2] for k in range(2)], -1)


def shown_places(pixels):
    return (pixels[..., :2].astype(float) - 50) / 200


@pytest.mark.parametrize("first", GEOMETRIC)
@pytest.mark.parametrize("second", [None, *GEOMETRIC])
def test_a_warp_says_where_the_pixels_come_from(first, second):
    steps = [(k, argument_of(k, 5.0, 1.0)) for k in (first, second) if k is not None]
    found = applied(places(64, 64), *steps, fill=(0, 0, 0))
    warp = warp_of(steps)
    expected = moved(warp, 64)
    shown = (found[..., :2] > 40).all(-1)
    smooth = shown & (np.abs(np.gradient(found[..., 1].astype(float))[0]) < 12)
    inside = ((expected > 0.03) & (expected < 0.97)).all(-1)
    assert shown.mean() > 0.3
    error = np.abs(shown_places(found) - expected).max(-1)
    assert np.quantile(error[shown & inside & smooth], 0.98) < 0.015


def test_on_pil_images_rand_augment_says_the_same():
    random.seed(0)
    np.random.seed(0)
    augment = PILRandAugment("rand-m9-mstd0.5-p1-inc1", FILL)
    pixels = photo(4, 48, 48)
    for _ in range(30):
        image, warp = augment(Image.fromarray(pixels))
        assert np.array_equal(applied(pixels, *augment.applied), image)
        assert np.array_equal(warp, warp_of(augment.applied))
    assert np.array_equal(warp_of([]), [[1, 0, 0], [0, 1, 0]])


def stream(path, **options):
    return build.stream(path, **dict(fill=FILL) | options)


def pixels_of(batches):
    return np.concatenate([images.numpy() for images, _ in batches])


def test_crops_and_order_are_the_same_with_and_without_augmentation(written):
    plain = pixels_of(stream(written))
    nothing = pixels_of(stream(written, rand_augment="rand-m9-p0-inc1"))
    assert np.array_equal(plain, nothing)
    augmented = pixels_of(stream(written, rand_augment=DEIT))
    same = (plain == augmented).all((1, 2, 3)).mean()
    assert 0.1 < same < 0.5  # a quarter draws no operation at all


def test_augmented_batches_do_not_depend_on_the_number_of_threads(written):
    expected = pixels_of(stream(written, rand_augment=DEIT, num_workers=1))
    assert np.array_equal(expected, pixels_of(stream(written, rand_augment=DEIT, num_workers=2)))
    other = stream(written, rand_augment=DEIT)
    other.set_epoch(1)
    assert not np.array_equal(expected, pixels_of(other))


def deits_sampler(num_samples, rank, world_size, epoch):
    """What RASampler of facebookresearch/deit, samplers.py, does."""
    g = torch.Generator()
    g.manual_seed(epoch)
    indices = torch.randperm(num_samples, generator=g).tolist()
    indices = [ele for ele in indices for i in range(3)]
    total_size = -(-num_samples * 3 // world_size) * world_size
    indices += indices[: total_size - len(indices)]
    return indices[rank:total_size:world_size][: int(num_samples // 256 * 256 / world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("epoch", [0, 3])
def test_repeated_augmentation_is_deits_index_for_index(world_size, epoch):
    for num_samples in 2000, 777:
        order = repeated_order(num_samples, 3, epoch)
        length = len(order) // world_size
        for rank in range(world_size):
            expected = deits_sampler(num_samples, rank, world_size, epoch)
            assert order[rank::world_size][:length].tolist() == expected


def test_streamed_views_of_an_image_follow_each_other_and_differ(written):
    one = stream(written, repeated_augmentations=3)
    assert len(one) == 8
    samples = one.samples(1)
    groups = samples[:63].reshape(-1, 3)
    assert (groups == groups[:, :1]).all() and len(set(groups[:, 0])) == 21
    assert samples.tolist() == repeated_order(71, 3, 1)[:64].tolist()
    one.set_epoch(1)
    seen = pixels_of(one)
    assert len({image.tobytes() for image in seen}) == 64
    ranks = [
        stream(written, repeated_augmentations=3, rank=r, world_size=2, batch_size=5)
        for r in range(2)
    ]
    both = np.stack([rank.samples(1) for rank in ranks], 1).flatten()
    assert both.tolist() == repeated_order(71, 3, 1)[: len(both)].tolist()
