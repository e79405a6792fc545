"""What the tests of commands share: a few photos in class folders, and a way to run src/*.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
# The smallest run that goes through every part.
QUICK = (
    "model=evit_deit_micro img_size=28 recipe.epochs=1 recipe.batch_size=4 recipe.lr=1e-3 "
    "recipe.warmup_epochs=0 recipe.shrink_start_epoch=0 recipe.shrink_epochs=0 "
    "recipe.ema_decay=null recipe.eval_every=1 trainer=cpu trainer.log_every_n_steps=1"
).split()


CLASSES = "cat dog elk fox gnu hen".split()


def write_photos(root: Path, train: int = 6, val: int = 3, classes: int = 2) -> Path:
    """ROOT/{train,val}/{cat,dog}/*.jpg: noise on a gray that tells the classes apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for level, name in zip(np.linspace(60, 190, classes, dtype=int), CLASSES, strict=False):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 50, level + 50, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture(scope="session")
def shared_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("shared") / "photos")


def command(script: str, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run python src/SCRIPT in a folder of the test's own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("IMAGENET_DIR", "WANDB_MODE")}
    return subprocess.run(
        [sys.executable, str(ROOT / "src" / script), *arguments],
        cwd=cwd,
        env=environment | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
