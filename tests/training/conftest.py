"""What the tests of interrupted runs share: a small run, killed where they say, and its traces."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from evit.training.module import Classifier

# Mixup, drop path, EMA, a moving keep rate, and 3 steps of 2 batches in each of 3 epochs.
ARGUMENTS = (
    "model=evit_deit_micro img_size=28 trainer=cpu trainer.accumulate_grad_batches=2 "
    "trainer.log_every_n_steps=1 recipe.epochs=3 recipe.batch_size=4 recipe.warmup_epochs=1 "
    "recipe.ema_decay=0.9 recipe.shrink_start_epoch=0 recipe.shrink_epochs=2 recipe.eval_every=1 "
    "logger=none checkpoint_every_n_steps=2 keep_checkpoint_every_n_epochs=2"
).split()
TIMED = {"seconds", "train/images_per_s", "train/data_wait"}


class Killed(Exception):
    pass


def kill() -> None:
    raise Killed


@pytest.fixture(scope="session")
def train(shared_photos):
    """Run src/train.py in this process and in a folder; kill it at a batch of an epoch."""
    import train

    step = Classifier.training_step

    def run(folder: Path, *more: str, kill_at: tuple[int, int] | None = None, kill=kill) -> str:
        def training_step(self, batch, batch_idx):
            if (self.current_epoch, batch_idx) == kill_at:
                kill()
            return step(self, batch, batch_idx)

        folder.mkdir(exist_ok=True)
        arguments = ["train.py", *ARGUMENTS, f"data.root={shared_photos}", *more]
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.delenv("IMAGENET_DIR", raising=False)
            patch.chdir(folder)
            patch.setattr(Classifier, "training_step", training_step)
            patch.setattr(sys, "argv", arguments)
            with contextlib.suppress(Killed):
                train.main()
        return printed.getvalue()

    return run


@pytest.fixture(scope="session")
def whole(train, tmp_path_factory) -> Path:
    """The folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(f"outputs/*/*/{pattern}")
    return path


def rows(folder: Path) -> list[dict]:
    lines = only(folder, "metrics.jsonl").read_text().splitlines()
    found = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]
    return [row for row in found if set(row) - {"step", "epoch"}]


def training_state(folder: Path) -> dict:
    found = torch.load(only(folder, "checkpoints/last.ckpt"), weights_only=True)
    names = ("state_dict", "ema_state_dict", "optimizer_states", "lr_schedulers")
    return {name: found[name] for name in names} | dict(step=found["global_step"])


def assert_equal(found: Path, expected: Path) -> None:
    """The same metrics, weights, averages and optimizer, to the bit; and the same files."""
    assert rows(found) == rows(expected)
    files = [{path.name for path in only(f, "checkpoints").iterdir()} for f in (found, expected)]
    assert files[0] == files[1]
    states = [training_state(folder) for folder in (found, expected)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
