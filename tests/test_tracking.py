"""metrics.jsonl and W&B."""

import json
import queue
import threading

import pytest
import wandb

from evit.tracking import JsonlLogger, start_service, wandb_logger, wandb_mode

RUN = dict(name="r", project="p", entity=None, group="g", tags=["t"], config={"keep_rate": 0.5})


def test_each_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    for step in range(3):
        logger.log_metrics({"train/loss": 0.5}, step)
        rows = [json.loads(line) for line in logger.path.read_text().splitlines()]
        assert len(rows) == step + 1
        assert (rows[-1]["step"], rows[-1]["train/loss"]) == (step, 0.5)


@pytest.mark.parametrize(("logged_in", "mode"), [(True, "online"), (False, "offline")])
def test_auto_is_online_for_those_who_are_logged_in(logged_in, mode, monkeypatch):
    monkeypatch.setattr(wandb, "login", lambda **_: logged_in)
    assert wandb_mode("auto") == mode


def test_a_mode_that_is_asked_for_is_taken():
    assert [wandb_mode(mode) for mode in ("online", "offline", "disabled")] == [
        *("online", "offline", "disabled")
    ]


def test_wandb_is_started_beside_other_work_unless_disabled(monkeypatch):
    started = queue.SimpleQueue()
    monkeypatch.setattr(wandb, "setup", lambda: started.put(threading.current_thread()))
    for mode in "disabled", "offline":
        start_service(mode)
    assert started.get(timeout=60) is not threading.main_thread() and started.empty()


def test_a_run_that_cannot_reach_wandb_goes_on_offline(tmp_path, monkeypatch):
    real = wandb.init

    def init(mode, **kwargs):
        if mode == "online":
            raise wandb.errors.CommError("unreachable")
        return real(mode=mode, **kwargs)

    monkeypatch.setattr(wandb, "init", init)
    with pytest.warns(UserWarning, match="W&B cannot be reached .unreachable.*offline"):
        logger = wandb_logger(tmp_path, mode="online", **RUN)
    assert (logger.experiment.group, logger.experiment.job_type) == ("g", "train")
    assert logger.experiment.config["keep_rate"] == 0.5
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_the_rows_of_steps_that_are_trained_again_are_taken_away(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    for step in range(5):
        logger.log_metrics({"train/loss": 0.5}, step)
    with logger.path.open("a") as file:
        file.write('{"step": 5, "train')  # killed here
    rows = JsonlLogger(logger.path, steps=3).path.read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2]


def test_a_run_that_goes_on_is_the_same_run_in_wandb_and_another_is_not(tmp_path):
    ids = []
    for folder in ("a", "a", "b"):
        ids.append(wandb_logger(tmp_path / folder, mode="offline", **RUN).version)
        wandb.finish()
    assert ids[0] == ids[1] != ids[2]
    assert len(list(tmp_path.glob(f"a/wandb/offline-run-*-{ids[0]}/*.wandb"))) in (1, 2)


def test_disabled_leaves_nothing(tmp_path):
    assert wandb_logger(tmp_path, mode="disabled", **RUN) is None
    assert not list(tmp_path.iterdir())
