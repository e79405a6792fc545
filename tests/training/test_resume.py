"""An interrupted run goes on as if nothing had happened: from within an epoch, too."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evit.training import checkpoints
from evit.training.module import Classifier
from tests.conftest import ROOT

# Mixup, drop path, EMA, a moving keep rate, and 3 steps of 2 batches in each of 3 epochs.
ARGUMENTS = (
    "model=evit_deit_micro img_size=28 trainer=cpu trainer.accumulate_grad_batches=2 "
    "trainer.log_every_n_steps=1 recipe.epochs=3 recipe.batch_size=4 recipe.warmup_epochs=1 "
    "recipe.ema_decay=0.9 recipe.shrink_start_epoch=0 recipe.shrink_epochs=2 recipe.eval_every=1 "
    "logger=none checkpoint_every_n_steps=2"
).split()
TIMED = {"seconds", "train/images_per_s", "train/data_wait"}


class Killed(Exception):
    pass


@pytest.fixture
def train(monkeypatch, shared_photos, capsys):
    """Run src/train.py in this process and in a folder; kill it at a batch of an epoch."""
    import train

    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    step = Classifier.training_step

    def run(folder: Path, *more: str, kill_at: tuple[int, int] | None = None) -> str:
        def training_step(self, batch, batch_idx):
            if (self.current_epoch, batch_idx) == kill_at:
                raise Killed
            return step(self, batch, batch_idx)

        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(Classifier, "training_step", training_step)
        arguments = ["train.py", *ARGUMENTS, f"data.root={shared_photos}", *more]
        monkeypatch.setattr(sys, "argv", arguments)
        if kill_at:
            with pytest.raises(Killed):
                train.main()
        else:
            train.main()
        return capsys.readouterr().out

    return run


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(f"outputs/*/*/{pattern}")
    return path


def rows(folder: Path) -> list[dict]:
    lines = only(folder, "metrics.jsonl").read_text().splitlines()
    found = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]
    return [row for row in found if set(row) - {"step", "epoch"}]


def training_state(folder: Path) -> dict:
    found = torch.load(only(folder, "checkpoints/last.ckpt"), weights_only=True)
    names = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers")
    return {name: found[name] for name in names} | dict(step=found["global_step"])


@pytest.mark.parametrize("data", ["backend=ffcv", "backend=imagefolder"])
def test_a_run_killed_within_and_between_epochs_equals_an_uninterrupted_one(data, train, tmp_path):
    options = (f"data.{data}", "data.num_workers=2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, *options)
    train(killed, *options, kill_at=(1, 4))  # after step 4, the first of epoch 1, was saved
    assert training_state(killed)["step"] == 4
    shown = train(killed, *options, kill_at=(2, 0))
    assert "Going on from" in shown and "last.ckpt" in shown
    assert training_state(killed)["step"] == 6
    train(killed, *options)
    assert rows(killed) == rows(whole)
    states = [training_state(folder) for folder in (killed, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_truncated_checkpoint_is_left_out_for_the_one_before(train, tmp_path):
    train(tmp_path, kill_at=(1, 4))
    folder = only(tmp_path, "checkpoints")
    last = folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="last.ckpt cannot be read .*: it is left out"):
        found = checkpoints.unfinished(folder.parent)
    assert found == folder / "previous.ckpt"
    assert checkpoints.optimizer_steps(found) == 3
    found.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="overwrite=true starts anew"):
        checkpoints.unfinished(folder.parent)


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    files, path = checkpoints.WholeFiles(), tmp_path / "a.ckpt"
    files.save_checkpoint(dict(x=1), path)

    def fail(_, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        files.save_checkpoint(dict(x=2), path)
    assert torch.load(path) == dict(x=1)


def test_a_run_may_begin_with_the_checkpoint_of_another(train, tmp_path):
    train(tmp_path / "first", kill_at=(1, 4))
    path = only(tmp_path / "first", "checkpoints/last.ckpt")
    train(tmp_path / "second", f"resume={path}")
    assert rows(tmp_path / "second")[0]["step"] == 4
    train(tmp_path / "whole")
    states = [training_state(tmp_path / name) for name in ("second", "whole")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_what_cannot_be_gone_on_with_is_named(tmp_path):
    with pytest.raises(ValueError, match="resume=lost.ckpt is neither auto nor a checkpoint"):
        checkpoints.given("lost.ckpt", tmp_path)
    weights = tmp_path / "weights.pth"
    torch.save(dict(model={}), weights)
    with pytest.raises(ValueError, match="holds weights alone: checkpoint=.*weights.pth"):
        checkpoints.given(str(weights), tmp_path / "run")
    with pytest.raises(ValueError, match="of this very run: take resume=auto"):
        checkpoints.given(str(weights), tmp_path)


def test_a_run_that_is_killed_goes_on_from_a_step(train, tmp_path, shared_photos):
    """SIGKILL, at the first checkpoint that is there."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    arguments = [*ARGUMENTS, f"data.root={shared_photos}", "checkpoint_every_n_steps=1"]
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "src/train.py"), *arguments],
        cwd=killed,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while run.poll() is None and not list(killed.glob("outputs/dev/*/checkpoints/last.ckpt")):
        time.sleep(0.001)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert training_state(killed)["step"] < 9
    assert "Going on from" in train(killed)
    train(whole)
    assert rows(killed) == rows(whole)
    states = [training_state(folder) for folder in (killed, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
