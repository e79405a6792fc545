import hashlib
import threading

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import center_crop, resize

from evit.data.ffcv.decode import center_crops, random_crops
from tests.data.build import stream

SIZE = 32


def digest(batch):
    return hashlib.md5(b"".join(tensor.numpy().tobytes() for tensor in batch)).hexdigest()


def digests(batches):
    return [digest(batch) for batch in batches]


@pytest.fixture(scope="module")
def train(written):
    return stream(written)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_batches_are_uint8_images_and_their_int64_labels(train):
    batches = list(train)
    assert len(batches) == len(train) == 71 // 8
    for images, labels in batches:
        assert images.shape == (8, 3, SIZE, SIZE) and images.dtype == torch.uint8
        assert labels.shape == (8,) and labels.dtype == torch.int64
    shown = torch.cat([labels for _, labels in batches]).tolist()
    assert shown == [k % 3 for k in train.samples(train.epoch)]


def test_nothing_is_read_before_the_first_batch(written):
    lazy = stream(written)
    before = threading.active_count()
    iterators = [iter(lazy) for _ in range(3)]
    assert threading.active_count() == before
    next(iterators[0])
    assert threading.active_count() == before + 1


def test_broken_epochs_leave_no_thread(train):
    before = threading.active_count()
    for _ in range(20):
        for _ in train:
            break
        assert threading.active_count() == before


@pytest.mark.parametrize("good", [0, 5])
def test_an_error_while_a_batch_is_made_is_raised_after_those_before(train, monkeypatch, good):
    read, calls = train.read, []

    def fail_later(*arguments):
        calls.append(1)
        if len(calls) > good:
            raise OSError("disk on fire")
        return read(*arguments)

    monkeypatch.setattr(train, "read", fail_later)
    seen = 0
    with pytest.raises(OSError, match="disk on fire"):
        for _ in train:
            seen += 1
    assert seen == good


def test_a_batch_stays_valid_when_later_ones_are_read(train):
    on_arrival, kept = [], []
    for batch in train:
        on_arrival.append(digest(batch))
        kept.append(batch)
    assert digests(kept) == on_arrival


def test_pytorch_keeps_its_threads(written):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        for _ in stream(written):
            assert torch.get_num_threads() == 7
        assert torch.get_num_threads() == 7
    finally:
        torch.set_num_threads(before)


def test_batches_do_not_depend_on_the_number_of_threads(written, train):
    expected = digests(train)
    for num_workers in 1, 2, 1000:
        assert digests(stream(written, num_workers=num_workers)) == expected


def test_an_epoch_is_the_same_whether_or_not_earlier_ones_were_run(written, train):
    epochs = []
    for epoch in range(3):
        train.sampler.set_epoch(epoch)  # as Lightning does
        epochs.append(digests(train))
    train.set_epoch(0)
    resumed = stream(written)
    resumed.set_epoch(2)
    assert digests(resumed) == epochs[2]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_epoch_goes_on_after_the_batches_that_were_seen(written, train):
    train.set_epoch(1)
    expected = digests(train)
    train.set_epoch(0)
    broken, resumed = stream(written), stream(written)
    broken.set_epoch(1)
    resumed.set_epoch(1)
    batches = iter(broken)
    seen = [digest(next(batches)) for _ in range(3)]
    resumed.load_state_dict(broken.state_dict())
    batches.close()
    assert seen + digests(resumed) == expected
    assert digests(resumed) == expected  # the next epoch is a whole one


def test_seed_epoch_and_rank_all_matter(written):
    def first(seed, epoch, rank):
        one = stream(written, seed=seed, rank=rank, world_size=2)
        one.set_epoch(epoch)
        return digest(next(iter(one)))

    keys = [(5, 0, 0), (5, 1, 0), (6, 0, 0), (6, 1, 0), (5, 0, 1), (5, 1, 1)]
    assert len({first(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("repeats", [2, 3])
def test_each_image_of_an_epoch_has_so_many_views_each_with_a_seed_of_its_own(written, repeats):
    one = stream(written, repeated_augmentations=repeats)
    order, seeds = map(one.own, one.draw(0))
    assert len(order) == 64 == len(np.unique(seeds))
    assert len(np.unique(order)) == -(-64 // repeats)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_train_on_disjoint_parts_of_equal_length(written, world_size):
    ranks = [
        stream(written, rank=rank, world_size=world_size, batch_size=5)
        for rank in range(world_size)
    ]
    parts = [rank.samples(epoch=3) for rank in ranks]
    assert {len(part) for part in parts} == {5 * len(ranks[0])}
    assert len(set(np.concatenate(parts))) == sum(map(len, parts)) > 71 - 5 * world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 33, 70, 71])
def test_ranks_evaluate_every_sample_exactly_once(written, world_size, num_samples):
    ranks = [
        stream(written, train=False, rank=rank, world_size=world_size, max_val_images=num_samples)
        for rank in range(world_size)
    ]
    parts = [rank.samples() for rank in ranks]
    assert sorted(np.concatenate(parts)) == sorted(ranks[0].indices)
    assert [len(rank) for rank in ranks] == [max(-(-len(part) // 8), 1) for part in parts]


def test_evaluation_reads_in_order_with_a_partial_last_batch(written):
    batches = list(stream(written, train=False, rank=1, world_size=2))
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 8, 3]
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == [k % 3 for k in range(1, 71, 2)]


def test_a_rank_without_samples_evaluates_one_empty_batch(written):
    ((images, labels),) = stream(written, train=False, rank=2, world_size=3, max_val_images=2)
    assert (images.shape, images.dtype) == ((0, 3, SIZE, SIZE), torch.uint8)
    assert (labels.shape, labels.dtype) == ((0,), torch.int64)


def test_training_and_evaluation_can_run_at_once(written, train):
    expected = digests(train), digests(stream(written, train=False))
    both = zip(train, stream(written, train=False), strict=False)
    assert [(digest(a), digest(b)) for a, b in both] == list(zip(*expected, strict=False))


def test_max_samples_keeps_the_same_subset_in_every_epoch(written):
    some = stream(written, max_train_images=24)
    assert len(some) == 3
    assert set(some.samples(0)) == set(some.samples(1)) == set(some.indices.tolist())
    assert some.samples(0).tolist() != some.samples(1).tolist()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 72}, "71 training images do not fill one batch of 72 x 1 on 1 processes"),
        ({"batch_size": 8, "max_train_images": 7}, "7 training images do not fill .* batch of 8"),
    ],
)
def test_numbers_that_do_not_fit_are_named(written, options, reason):
    with pytest.raises(ValueError, match=reason):
        stream(written, **options)


def test_flip_mirrors_the_same_crop(written):
    plain, mirrored = (next(iter(stream(written, flip=flip)))[0] for flip in (0.0, 1.0))
    assert torch.equal(plain.flip(3), mirrored)


def test_crops_are_distributed_as_torchvisions():
    n, height, width, scale, ratio = 4000, 375, 500, (0.08, 1.0), (3 / 4, 4 / 3)
    side = np.ones(n, np.int64)
    seeds = np.arange(n, dtype=np.uint32)
    boxes, flips = random_crops(
        height * side, width * side, seeds, np.array(scale), np.array(ratio), 0.5
    )
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)])
    quantiles = np.linspace(0, 1, 11)[1:-1]
    for column in range(4):
        ours_q, theirs_q = (np.quantile(b[:, column], quantiles) for b in (boxes, theirs))
        assert np.abs(ours_q - theirs_q).max() < 0.04 * width
    assert 0.47 < flips.mean() < 0.53
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (2, 3)])
def test_crops_of_extreme_images_lie_inside(shape):
    sizes, seeds = [side * np.ones(200, np.int64) for side in shape], np.arange(200, dtype="u4")
    boxes, _ = random_crops(*sizes, seeds, np.array([0.08, 1.0]), np.array([0.75, 4 / 3]), 0.5)
    for found in boxes, *(center_crops(*sizes, 224, share) for share in (0.4, 0.875)):
        assert (found[:, :2] >= 0).all() and (found[:, 2:] >= 1).all()
        assert (found[:, :2] + found[:, 2:] <= shape).all()


def test_the_centre_crop_is_exact_where_nothing_is_resized():
    heights, widths = np.array([256, 301, 256]), np.array([256, 256, 411])
    for box, height, width in zip(
        center_crops(heights, widths, 224, 0.875), heights, widths, strict=True
    ):
        positions = torch.arange(height * width).view(1, height, width)
        top, left, side, _ = box
        cropped = positions[:, top : top + side, left : left + side]
        assert torch.equal(cropped, center_crop(positions, [224, 224]))


def test_evaluation_sees_what_torchvision_sees(written, samples):
    images = torch.cat([images for images, _ in stream(written, train=False)])
    differences = []
    for (path, _), found in zip(samples, images, strict=True):
        with Image.open(path) as image:
            expected = center_crop(resize(image.convert("RGB"), int(SIZE / 0.875)), SIZE)
        differences.append(np.abs(np.asarray(expected, float) - found.permute(1, 2, 0).numpy()))
    # Half a pixel of these small pictures is 5 grey levels or so.
    assert np.mean(differences) < 4


class Recorder(L.LightningModule):
    """A model that learns nothing and remembers what it was shown, per epoch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.seen: dict[int, list[str]] = {}

    def training_step(self, batch, _):
        assert threading.active_count() <= 3  # the main thread, the reader, Lightning's timer
        self.seen.setdefault(self.current_epoch, []).append(digest(batch))

    def configure_optimizers(self):
        return None


def test_lightning_shows_the_model_the_batches_of_its_epoch(written, tmp_path):
    expected = {}
    for epoch in range(3):
        alone = stream(written)
        alone.set_epoch(epoch)
        expected[epoch] = digests(alone)[:5]

    def fit(max_epochs, checkpoint=None):
        model = Recorder()
        trainer = L.Trainer(
            max_epochs=max_epochs,
            limit_train_batches=5,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, stream(written), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{max_epochs}.ckpt")
        return model.seen

    assert fit(2) == {epoch: expected[epoch] for epoch in (0, 1)}
    assert fit(3, tmp_path / "2.ckpt") == {2: expected[2]}
