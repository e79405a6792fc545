"""An interrupted run goes on as if nothing had happened: from within an epoch, too."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from evit.data.order import EpochLoader, Shard
from evit.report import results
from evit.training import callbacks
from tests.conftest import FORKS, ROOT, run_script
from tests.data.build import recipe_of
from tests.training.conftest import ARGUMENTS, assert_equal, only, rows, training_state


def test_the_best_checkpoint_is_of_an_epoch_at_the_final_keep_rate(whole):
    (path,) = whole.glob("outputs/dev/*/checkpoints/best.ckpt")
    assert torch.load(path, weights_only=True)["epoch"] == 2


def test_the_last_checkpoint_knows_the_best_of_its_epoch(whole):
    (path,) = whole.glob("outputs/dev/*/checkpoints/last.ckpt")
    states = torch.load(path, weights_only=True)["callbacks"]
    (best,) = (state for name, state in states.items() if name.startswith("BestCheckpoint"))
    assert Path(best["best_model_path"]).name == "best.ckpt"


class Batches(EpochLoader):
    def __init__(self, length: int):
        super().__init__(length, recipe_of(batch_size=1), Shard(), True, 1)

    def batches(self, start: int):
        yield from range(start, len(self))


@pytest.mark.parametrize(("seen", "left"), [(0, 2), (3, None), (4, 2)])
def test_an_epoch_is_not_gone_on_with_in_batches_of_another_size(seen, left):
    before, after = Batches(4), Batches(2)
    before.position = seen
    if left is None:
        with pytest.raises(ValueError, match="within an epoch of 4 batches.*as many processes"):
            after.load_state_dict(before.state_dict())
    else:
        after.load_state_dict(before.state_dict())
        assert len(list(after)) == left


def test_a_run_killed_within_and_between_epochs_equals_an_uninterrupted_one(train, whole, tmp_path):
    train(tmp_path, kill_at=(1, 4))  # after step 4, the first of epoch 1, was saved
    assert training_state(tmp_path)["step"] == 4
    only(tmp_path, "checkpoints").joinpath("best.ckpt.tmp").touch()  # as SIGKILL leaves it
    train(tmp_path, kill_at=(2, 0))
    assert training_state(tmp_path)["step"] == 6
    assert "Going on from" in train(tmp_path)
    assert_equal(tmp_path, whole)


def test_so_does_one_whose_images_are_read_by_other_processes(train, tmp_path):
    options = ("data.backend=imagefolder", "data.num_workers=2")
    train(tmp_path / "whole", *options)
    for kill_at in (1, 4), (2, 0), None:
        train(tmp_path / "killed", *options, kill_at=kill_at)
    assert_equal(tmp_path / "killed", tmp_path / "whole")


def test_of_every_second_epoch_the_checkpoint_is_kept(whole):
    folder = only(whole, "checkpoints")
    names = {path.name for path in folder.iterdir()}
    assert names == {"last.ckpt", "previous.ckpt", "best.ckpt", "epoch_002.ckpt"}
    assert callbacks.optimizer_steps(folder / "epoch_002.ckpt") == 6


def truncated(content: bytes) -> bytes:
    return content[:-1000]


def flipped(content: bytes) -> bytes:
    """Of a weight: torch.load would not notice."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damaged", [truncated, flipped])
def test_a_damaged_checkpoint_is_left_out_for_the_one_before(damaged, train, tmp_path):
    train(tmp_path, kill_at=(1, 4))
    folder = only(tmp_path, "checkpoints")
    last = folder / "last.ckpt"
    last.write_bytes(damaged(last.read_bytes()))
    with pytest.warns(UserWarning, match="last.ckpt' cannot be read.*: it is left out"):
        found, steps = callbacks.unfinished(folder.parent)
    assert found == folder / "previous.ckpt" and steps == 3
    kept = found.rename(folder / "epoch_001.ckpt")
    found.touch()
    with pytest.warns(UserWarning):
        assert callbacks.unfinished(folder.parent) == (kept, 3)
    kept.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="overwrite=true starts anew"):
        callbacks.unfinished(folder.parent)


def test_a_run_whose_metrics_cannot_be_read_is_not_tracked(train, tmp_path, monkeypatch):
    """For nothing would end W&B's run."""
    train(tmp_path, kill_at=(1, 0))
    only(tmp_path, "metrics.jsonl").write_text("damaged\n")
    monkeypatch.setattr("evit.commands.train.wandb_logger", lambda *_, **__: pytest.fail("tracked"))
    with pytest.raises(SystemExit):
        train(tmp_path)


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    files, path = callbacks.WholeFiles(), tmp_path / "a.ckpt"
    files.save_checkpoint(dict(x=1), path)

    def fail(_, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        files.save_checkpoint(dict(x=2), path)
    assert torch.load(path) == dict(x=1)


def test_a_run_may_begin_with_the_checkpoint_of_another(train, whole, tmp_path):
    train(tmp_path / "first", kill_at=(1, 4))
    path = only(tmp_path / "first", "checkpoints/last.ckpt")
    train(tmp_path / "second", f"resume={path}")
    assert rows(tmp_path / "second") == [row for row in rows(whole) if row["step"] >= 4]
    states = [training_state(folder) for folder in (tmp_path / "second", whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_checkpoint_that_has_seen_all_epochs_is_not_gone_on_with(train, whole, tmp_path, capfd):
    path = only(whole, "checkpoints/last.ckpt")
    with pytest.raises(SystemExit):
        train(tmp_path, f"resume={path}")
    assert f"{path} has seen 9 steps, and this run has 9 in 3 epochs" in capfd.readouterr().err
    assert not list(tmp_path.glob("outputs/**/*.json"))


def test_a_run_that_starts_anew_leaves_nothing_to_go_on_with(tmp_path):
    left = ["checkpoints/last.ckpt", "hpc_ckpt_1.ckpt", "metrics.jsonl", "wandb/run_id"]
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    results.start(tmp_path, {})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config.json"]


def test_what_cannot_be_gone_on_with_is_named(tmp_path):
    with pytest.raises(ValueError, match="lost.ckpt' does not exist: give the path of a file"):
        callbacks.given("lost.ckpt", tmp_path)
    weights = tmp_path / "weights.pth"
    torch.save(dict(model={}), weights)
    with pytest.raises(ValueError, match="holds weights alone: checkpoint=.*weights.pth"):
        callbacks.given(str(weights), tmp_path / "run")
    with pytest.raises(ValueError, match="of this very run: take resume=auto"):
        callbacks.given(str(weights), tmp_path)


def test_a_program_that_is_killed_goes_on_from_its_first_checkpoint(
    train, whole, tmp_path, shared_photos
):
    arguments = [*ARGUMENTS, f"data.root={shared_photos}", "checkpoint_every_n_steps=1"]
    argv = [str(ROOT / "src/train.py"), *arguments]
    streams = tmp_path / "stdout", tmp_path / "stderr"
    program = FORKS.Process(target=run_script, args=(argv, tmp_path, {}, streams))
    program.start()
    while program.is_alive() and not list(tmp_path.glob("outputs/dev/*/checkpoints/last.ckpt")):
        time.sleep(0.001)
    program.kill()
    program.join()
    assert program.exitcode == -signal.SIGKILL
    assert training_state(tmp_path)["step"] < 9
    assert "Going on from" in train(tmp_path)
    assert_equal(tmp_path, whole)


def test_a_checkpoint_says_of_itself_what_it_is(whole):
    """Wherever it is moved; and config.json has the same knobs at its root."""
    knobs = torch.load(only(whole, "checkpoints/best.ckpt"), weights_only=True)["evit"]
    assert knobs["model"]["model_name"] == "evit_deit_tiny_patch16"
    assert (knobs["keep_rate"], knobs["fusion"], knobs["img_size"]) == (0.7, True, 28)
    assert (knobs["data"], knobs["classes"]) == ("photos", ["cat", "dog"])
    assert len(knobs["mean"]) == len(knobs["std"]) == 3
    config = json.loads(only(whole, "config.json").read_text())
    names = ("keep_rate", "fusion", "img_size", "crop_pct", "model")
    assert {name: config[name] for name in names} == {name: knobs[name] for name in names}
