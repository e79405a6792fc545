"""What augmentation costs, and how far evaluation is from the published protocol."""

import pytest

from evit.measure.augmentation import AUGMENTATIONS, PLAIN, time_augmentations, time_batch_steps
from evit.measure.crops import evaluation_differences


def test_every_augmentation_is_timed_beside_crop_and_flip(shared_photos):
    rows = time_augmentations(shared_photos, img_size=32, batch_size=4, repetitions=1)
    assert [row["name"] for row in rows] == list(AUGMENTATIONS)
    assert rows[0]["name"] == PLAIN and rows[0]["extra"] == 0
    for row in rows[1:]:
        assert row["cpu_ms"] == pytest.approx(rows[0]["cpu_ms"] * (1 + row["extra"]))


def test_steps_of_a_batch_are_timed():
    rows = time_batch_steps(img_size=32, batch_size=4, repetitions=1)
    assert len(rows) == 3 and all(row["cpu_ms"] > 0 for row in rows)


def test_evaluation_by_ffcv_differs_from_the_published_by_resampling_alone(shared_photos):
    found = evaluation_differences(shared_photos, img_size=28, crop_pct=1.0)
    assert set(found) == {"ffcv", "PIL bilinear"}
    assert 0 < found["PIL bilinear"] < 25 and 0 < found["ffcv"] < 25  # the photos are noise
    same = evaluation_differences(shared_photos, img_size=40, crop_pct=1.0)
    assert max(same.values()) < 0.5  # nothing is resized
