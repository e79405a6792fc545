"""W&B's client against a server: openwandb, which is installed for these tests alone."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb

from evit.commands.report import KEYS
from tests.conftest import QUICK, ROOT, command

pytestmark = pytest.mark.slow
OPENWANDB = "openwandb==0.5.25"


class Server:
    """Listens on 127.0.0.1; its records are in SQLite, its files in folders."""

    def __init__(self, program: Path, folder: Path):
        self.program, self.folder = program, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.env = dict(WANDB_BASE_URL=f"http://127.0.0.1:{self.port}", WANDB_API_KEY=KEY)
        self.start()

    def start(self) -> None:
        words = [self.program, "serve", "--host=127.0.0.1", f"--port={self.port}"]
        words.append(f"--data-dir={self.folder}")
        log = (self.folder / "log").open("a")
        self.process = subprocess.Popen(words, stdout=log, stderr=log)
        until = time.monotonic() + 60
        while time.monotonic() < until and self.process.poll() is None:
            with socket.socket() as client:
                if not client.connect_ex(("127.0.0.1", self.port)):
                    return
            time.sleep(0.1)
        raise TimeoutError((self.folder / "log").read_text())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def rows(self, query: str, *values: object) -> list[tuple]:
        with sqlite3.connect(self.folder / "openwandb.db") as database:
            return database.execute(query, values).fetchall()

    def history(self, run_id: str, key: str) -> list[float]:
        query = "select value from metrics where run_id = ? and key = ? order by step"
        return [value for (value,) in self.rows(query, run_id, key)]

    def summary(self, run_id: str) -> dict:
        ((text,),) = self.rows("select summary_json from runs where run_id = ?", run_id)
        return json.loads(text)


KEY = "local" + 40 * "0"  # openwandb's own


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    uv = shutil.which("uv") or ROOT / ".cache/uv/bin/uv"
    folder = tmp_path_factory.mktemp("openwandb")
    try:
        subprocess.run([uv, "venv", "-q", folder], check=True)
        python = f"--python={folder}/bin/python"
        subprocess.run([uv, "pip", "install", "-q", python, OPENWANDB], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{OPENWANDB} cannot be installed here: {error}")
    return folder / "bin/openwandb"


@pytest.fixture
def server(program, tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(program, folder)
    yield server
    server.kill()


def train(photos: Path, folder: Path, *more: str, **env: str) -> tuple[dict, str]:
    done = command("train.py", *QUICK, f"data.root={photos}", *more, cwd=folder, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("outputs/*/*/result.json")
    return json.loads(path.read_text()), done.stdout + done.stderr


def sync(folder: Path, env: dict[str, str]) -> str:
    words = ["make", "--old-file=setup", "sync", f"RUNS={folder}/outputs"]
    own = {k: v for k, v in os.environ.items() if k != "MAKEFLAGS"} | env
    done = subprocess.run(words, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def check(server: Server, result: dict, folder: Path) -> None:
    """All of a run is there: numbers, pictures, its configuration and the table."""
    run_id = result["wandb_id"]
    summary = server.summary(run_id)
    assert set(KEYS) | {"params"} <= set(summary)
    for key in ("top1", "top5", "throughput"):
        assert summary[key] == pytest.approx(result[key])
    assert (summary["macs"], summary["params"]) == (
        result["model"]["macs"],
        result["model"]["params"],
    )
    assert (summary["model"], summary["keep_rate"], summary["fusion"], summary["img_size"]) == (
        *("evit_deit_micro", 0.7),
        *(True, 28),
    )
    ((text, name, state),) = server.rows(
        "select config_json, display_name, state from runs where run_id = ?", run_id
    )
    config = {key: entry["value"] for key, entry in json.loads(text).items()}
    assert {key: config[key] for key in result["config"]} == result["config"]
    assert (name, state) == (next(folder.glob("outputs/*/*")).name, "finished")
    (metrics,) = folder.glob("outputs/*/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for key in ("train/loss", "val/top1"):
        logged = [row[key] for row in rows if key in row]
        assert logged and server.history(run_id, key) == pytest.approx(logged)
    files = [path for (path,) in server.rows("select name from files where run_id = ?", run_id)]
    pictures = [name for name in files if name.startswith("media/images/kept_patches")]
    assert len(pictures) == result["config"]["recipe"]["epochs"]
    assert any(name.startswith("media/table/result") for name in files)


def test_a_run_online_is_on_the_server_whole(server, shared_photos, tmp_path):
    result, shown = train(shared_photos, tmp_path, "recipe.epochs=2", **server.env)
    assert f"127.0.0.1:{server.port}" in shown  # where to look at it
    check(server, result, tmp_path)


def test_a_run_offline_is_after_make_sync(server, shared_photos, tmp_path):
    result, _ = train(shared_photos, tmp_path, "logger.mode=offline")
    assert not server.rows("select * from runs")
    assert "Finished syncing" in sync(tmp_path, server.env)
    check(server, result, tmp_path)
    assert "Skipped 1 synced" in sync(tmp_path, server.env)


def test_a_run_whose_server_goes_away_ends_and_is_uploaded_later(server, shared_photos, tmp_path):
    def kill():
        while not list(tmp_path.glob("outputs/*/*/checkpoints/last.ckpt")):
            time.sleep(0.01)
        server.kill()

    threading.Thread(target=kill, daemon=True).start()
    env = server.env | dict(WANDB_FINISH_TIMEOUT="5")
    result, shown = train(shared_photos, tmp_path, "recipe.epochs=4", **env)
    (folder,) = re.findall(r"`wandb sync (\S+)` uploads", shown)
    server.start()
    words = [ROOT / ".venv/bin/wandb", "sync", folder]
    subprocess.run(words, env=dict(os.environ) | server.env, check=True)
    check(server, result, tmp_path)


def test_a_run_whose_wandb_process_is_killed_ends_without(server, shared_photos, tmp_path):
    def kill():
        while not list(tmp_path.glob("outputs/*/*/checkpoints/last.ckpt")):
            time.sleep(0.01)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if b"wandb-core" in path.read_bytes() and (path.parent / "cwd").samefile(tmp_path):
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except OSError:
                pass

    threading.Thread(target=kill, daemon=True).start()
    result, shown = train(shared_photos, tmp_path, "recipe.epochs=4", **server.env)
    assert shown.count("W&B has failed") == 1 and "uploads what W&B has" in shown
    assert "Traceback" not in shown
    (metrics,) = tmp_path.glob("outputs/*/*/metrics.jsonl")
    assert metrics.read_text().count("val/top1") == 4 and result["top1"] >= 0


def test_the_dashboard_says_what_the_server_refuses(server, tmp_path, monkeypatch, capsys):
    import dashboard as script

    monkeypatch.setattr(sys, "argv", ["dashboard.py", "entity=default"])
    monkeypatch.chdir(tmp_path)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # what it knows of the environment
    with pytest.raises(SystemExit) as ended:
        script.main()
    wandb.teardown()
    message = capsys.readouterr().err
    assert ended.value.code == 2 and "W&B refuses, or cannot be reached" in message
