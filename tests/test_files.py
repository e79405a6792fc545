"""Files are whole or not there, on a disk that is really full."""

import errno
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from evit import files
from evit.models.weights import read_file
from evit.report import results
from evit.tracking import JsonlLogger
from evit.training.callbacks import WholeFiles


def checkpoint(path: Path, size: int) -> None:
    WholeFiles().save_checkpoint(dict(x=torch.zeros(size)), path)


def result(path: Path, size: int) -> None:
    results.write_json(dict(x=[0.5] * size), path)


def picture(path: Path, size: int) -> None:
    with files.whole_file(path) as file:
        Image.effect_noise((size, 8), 50).save(file, "png")


@pytest.mark.parametrize("write", [checkpoint, result, picture])
def test_a_file_that_does_not_fit_leaves_the_one_before_and_says_why(write, small_disk):
    path = small_disk / "file"
    write(path, 10)
    before = path.read_bytes()
    with pytest.raises(OSError) as error:
        write(path, 20_000)
    assert path.read_bytes() == before
    assert [path.name for path in small_disk.iterdir()] == ["file"]
    text = files.refused(error.value, small_disk)
    assert "file cannot be used: No space left on device. Make room" in text


def test_metrics_that_do_not_fit_are_cut_and_logged_again(small_disk):
    log = JsonlLogger(small_disk / "metrics.jsonl")
    (small_disk / "filler").write_bytes(bytes(60_000))
    with pytest.raises(OSError) as error:
        for step in range(1000):
            log.log_metrics({"x": 0.5}, step)
    assert error.value.errno == errno.ENOSPC
    (small_disk / "filler").unlink()
    log = JsonlLogger(log.path, steps=step)
    log.log_metrics({"x": 0.5}, step)
    assert log.path.read_text().count("\n") == step + 1


def test_whichever_bit_of_a_checkpoint_flips_it_is_noticed_or_means_nothing(tmp_path):
    path, rng = tmp_path / "a.ckpt", random.Random(0)
    weights = torch.randn(50, 10)
    torch.save(dict(x=weights), path)
    content, passed = path.read_bytes(), 0
    for _ in range(300):
        bit = rng.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with suppress(ValueError):
            assert torch.equal(read_file(path)["x"], weights)
            passed += 1
    assert passed < 100
