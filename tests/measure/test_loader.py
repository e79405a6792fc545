import multiprocessing
import time

import numpy as np
import pytest
from PIL import Image

from evit.measure.loader import BASELINE, _cpu_seconds, time_loaders


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 JPEGs and a PNG in DIR/train/CLASS."""
    root = tmp_path_factory.mktemp("photos")
    for k in range(13):
        path = root / "train" / "ab"[k % 2] / (f"{k}.jpg" if k else "0.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(k).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture(scope="module")
def rows(photos):
    return time_loaders(photos, img_size=32, repetitions=3, num_workers=1)


def test_all_loaders_read_the_jpegs_that_ffcv_keeps(rows):
    assert [(row["name"], row["images"]) for row in rows] == [
        (BASELINE, 12),
        ("ImageFolder, PIL bicubic", 12),
        ("FFCV", 12),
    ]


def test_times_are_positive_and_their_median_lies_between_the_extremes(rows):
    for row in rows:
        assert 0 < row["cpu_ms_min"] <= row["cpu_ms"] <= row["cpu_ms_max"]
        assert row["images_per_second"] > 0 and row["times_faster"] > 0
    assert rows[0]["times_faster"] == 1


def test_no_process_is_left(rows):
    assert multiprocessing.active_children() == []


def test_a_choice_of_images_from_bare_class_folders(photos):
    rows = time_loaders(photos / "train", 32, repetitions=1, max_images=5, num_workers=1)
    assert {row["images"] for row in rows} <= {4, 5}  # the PNG may be among the five


def test_a_folder_without_jpegs_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.png")
    with pytest.raises(ValueError, match="holds no JPEG"):
        time_loaders(tmp_path)


def test_the_cpu_time_of_a_child_counts_and_waiting_does_not():
    def burn(until, done):
        while time.process_time() < until:
            pass
        done.set()
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    done = context.Event()
    before = _cpu_seconds()
    child = context.Process(target=burn, args=(0.3, done), daemon=True)
    child.start()
    done.wait(20)
    spent = _cpu_seconds() - before
    child.kill()
    child.join()
    assert 0.3 <= spent < 0.5
