"""metrics.jsonl and W&B."""

import json
import os
import re
import signal
import subprocess
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb
from PIL import Image

from evit.tracking import JsonlLogger, wandb_logger, wandb_mode

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


class Refusal(BaseHTTPRequestHandler):
    """What a server answers to a wrong key."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(401)

    def log_message(self, *_):
        pass


ABSENT = pytest.param("nobody there", marks=pytest.mark.slow)  # W&B tries for 13 s


@pytest.fixture(params=["wrong key", "malformed key", ABSENT])
def no_wandb(request, monkeypatch):
    """W&B, as it fails at the start: the reason that it gives."""
    monkeypatch.setenv("WANDB_API_KEY", "short" if request.param == "malformed key" else 40 * "0")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        if request.param == "nobody there":
            server.server_close()
        else:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        wandb.teardown()  # what it knows of the environment, and of an earlier test's key
        yield {"wrong key": "401", "malformed key": "40. characters"}.get(request.param, "refused|")
        wandb.teardown()
        if request.param != "nobody there":
            server.shutdown()


FAILED = "W&B has failed .*: the run goes on untracked; metrics.jsonl and result.json have"


def test_a_run_that_cannot_reach_wandb_goes_on_and_says_so_in_one_line(tmp_path, no_wandb, capfd):
    tracker = wandb_logger(tmp_path, mode=wandb_mode("auto"), **RUN)
    tracker.log_metrics({"val/top1": 50.0}, 7)
    tracker.end()
    lines = [line for line in capfd.readouterr().out.splitlines() if "W&B" in line]
    assert len(lines) == 1 and re.match(FAILED, lines[0]) and re.search(no_wandb, lines[0])


def service() -> int:
    """The process of W&B that this one has started."""
    for path in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            text = path.read_text()
            if f"PPid:\t{os.getpid()}\n" in text and "Name:\twandb-core" in text:
                return int(path.parent.name)
    raise LookupError


def test_what_is_logged_is_in_wandbs_file(tmp_path):
    tracker = wandb_logger(tmp_path, mode="offline", **RUN)
    assert (tracker.run.group, tracker.run.job_type) == ("g", "train")
    assert tracker.run.config["keep_rate"] == 0.5
    tracker.log_metrics({"train/loss": 1.0}, 0)
    tracker.log_image("kept_patches", Image.new("RGB", (8, 8)), 4)
    tracker.log_summary({"top1": 50.0, "keep_rate": [0.5, 0.7]})
    tracker.end()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    content = (folder / f"run-{tracker.run_id}.wandb").read_bytes()
    assert b"train/loss" in content and b"top1" in content
    assert list(folder.glob("files/media/images/*.jpg"))


def test_a_run_whose_wandb_process_is_killed_goes_on_without_and_says_so_once(tmp_path, capfd):
    tracker = wandb_logger(tmp_path, mode="offline", **RUN)
    tracker.log_metrics({"train/loss": 1.0}, 0)
    os.kill(service(), signal.SIGKILL)
    for step in range(1, 4):
        tracker.log_metrics({"train/loss": 0.5}, step)
    tracker.log_image("kept_patches", Image.new("RGB", (8, 8)), 4)
    tracker.log_summary({"top1": 50.0, "keep_rate": [0.5, 0.7]})
    tracker.end()
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "W&B" in line]
    assert re.match(FAILED, line) and "`wandb sync " in line


def test_a_run_that_cannot_be_tracked_at_all_goes_on_and_says_so_once(tmp_path, capfd):
    (tmp_path / "wandb").write_text("a file where the folder should be")
    tracker = wandb_logger(tmp_path, mode="offline", **RUN)
    tracker.log_metrics({"train/loss": 1.0}, 0)
    tracker.end()
    assert len(re.findall(FAILED, capfd.readouterr().out)) == 1


def test_a_full_disk_for_wandb_does_not_stop_a_run(tmp_path, capfd):
    folder = tmp_path / "wandb"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]).returncode:
        pytest.skip("only root mounts a small disk")
    try:
        tracker = wandb_logger(tmp_path, mode="offline", **RUN)
        noise = Image.frombytes("RGB", (512, 512), os.urandom(3 * 512 * 512))
        tracker.log_image("kept_patches", noise, 1)
        tracker.log_metrics({"train/loss": 1.0}, 2)
        tracker.end()
        (line,) = [line for line in capfd.readouterr().out.splitlines() if "W&B" in line]
        assert re.match(FAILED, line) and "No space left on device" in line
    finally:
        subprocess.run(["umount", folder], check=True)


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
        tracker = wandb_logger(tmp_path / folder, mode="offline", **RUN)
        ids.append(tracker.run_id)
        tracker.end()
    assert ids[0] == ids[1] != ids[2]
    assert len(list(tmp_path.glob(f"a/wandb/offline-run-*-{ids[0]}/*.wandb"))) in (1, 2)


def test_disabled_leaves_nothing(tmp_path):
    assert wandb_logger(tmp_path, mode="disabled", **RUN) is None
    assert not list(tmp_path.iterdir())


def test_the_seconds_of_a_resumed_run_count_all_of_its_parts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [dict(step=step, loss=1.0, seconds=100.0 * (step + 1)) for step in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    logger = JsonlLogger(path, steps=2)  # goes on after two of three steps
    logger.log_metrics(dict(loss=0.5), step=2)
    *_, last = map(json.loads, path.read_text().splitlines())
    assert (last["step"], last["loss"]) == (2, 0.5) and 300 <= last["seconds"] < 310
    assert logger.earlier == 300
