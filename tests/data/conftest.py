"""Small pictures with structure, and files of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evit.data.ffcv  # noqa: F401  (before any other import of FFCV)
from evit.data.ffcv import sidecar_path
from evit.data.ffcv.write import write_beton

CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="session")
def picture():
    """A smooth random RGB image of a seed, a width and a height."""

    def draw(seed: int, width: int, height: int) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return draw


@pytest.fixture(scope="session")
def samples(picture, tmp_path_factory):
    """71 JPEG files of varied size, and their labels."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for k in range(71):
        path = folder / f"{k:02}.jpg"
        width, height = np.random.default_rng(k).integers(40, 120, 2).tolist()
        picture(k, width, height).save(path, quality=90)
        found.append((path, k % len(CLASSES)))
    return found


@pytest.fixture(scope="session")
def written(samples, tmp_path_factory) -> Path:
    """The file of these samples; read only."""
    path = tmp_path_factory.mktemp("beton") / "train.beton"
    write_beton(path, samples, classes=CLASSES, source="test", num_workers=2)
    return path


@pytest.fixture
def copied(written, tmp_path) -> Path:
    """A copy of that file, to be damaged."""
    path = tmp_path / "copy.beton"
    shutil.copy(written, path)
    shutil.copy(sidecar_path(written), sidecar_path(path))
    return path
