"""How much memory large images need, of the whole command."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT


@pytest.mark.slow
def test_lvvit_trains_and_evaluates_on_448_px_in_less_than_12_gib(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        for name in "cat", "dog":
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for k in range(count // 2):
                coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
                coarse.resize((640, 480)).save(tmp_path / "photos" / split / name / f"{k}.jpg")
    arguments = (
        "model=evit_lvvit img_size=448 keep_rate=0.7 data=folder data.root=photos trainer=cpu "
        "logger=none recipe.batch_size=32 recipe.epochs=1 recipe.warmup_epochs=0 "
        "recipe.shrink_start_epoch=0 recipe.shrink_epochs=0 recipe.eval_every=1"
    )
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "src/train.py"), *arguments.split()],
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (tmp_path / "output").read_text()
    (path,) = tmp_path.glob("outputs/*/*/result.json")
    assert 0 <= json.loads(path.read_text())["top1"] <= 100
    assert 2 * 2**20 < usage.ru_maxrss < 12 * 2**20  # KiB
