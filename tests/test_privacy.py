"""A run keeps to itself: it tells no secret, and nothing of it can be reached from elsewhere."""

import subprocess
import threading

import psutil
import pytest

from evit.report import page
from evit.report.collect import read
from tests.conftest import QUICK, command

SECRETS = dict(
    WANDB_API_KEY="5ec4e7" * 6 + "abcd",
    AWS_SECRET_ACCESS_KEY="aws-5ec4e7-key",
    HF_TOKEN="hf_5ec4e7Token",
    SLURM_JWT="jwt-5ec4e7-token",
    DATABASE_URL="postgresql://user:5ec4e7@host/db",
)
ORIGIN = "https://user:5ec4e7@example.org/code.git"


def listening(process: psutil.Process) -> set[str]:
    """The addresses at which a process waits for connections, unless they are of this machine."""
    try:
        found = process.net_connections("inet")
    except psutil.Error:
        return set()
    waiting = {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}
    return {ip for ip in waiting if not ip.startswith("127.") and ip != "::1"}


class Watch(threading.Thread):
    """Looks at all processes that this one has started, over and over."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.names: set[str] = set()
        self.reachable: set[tuple[str, str]] = set()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    self.names.add(process.name())
                except psutil.Error:
                    continue
                self.reachable |= {(process.name(), ip) for ip in listening(process)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shared_photos):
    """The folder of a run, tracked offline, what it printed, and how it was watched."""
    folder = tmp_path_factory.mktemp("privacy")
    for step in (["init", "-q"], ["remote", "add", "origin", ORIGIN]):
        subprocess.run(["git", *step], cwd=folder, check=True)
    watch = Watch()
    watch.start()
    arguments = [*QUICK, f"data.root={shared_photos}", "logger.mode=offline"]
    arguments += ["data.backend=imagefolder", "data.num_workers=0"]
    done = command("train.py", *arguments, cwd=folder, **SECRETS)
    watch.done.set()
    watch.join()
    assert done.returncode == 0, done.stderr
    return folder / "outputs", done.stdout + done.stderr, watch


def test_no_secret_is_in_what_a_run_leaves_or_prints(finished):
    outputs, printed, _ = finished
    assert "5ec4e7" not in printed
    contents = {path: path.read_bytes() for path in outputs.rglob("*") if path.is_file()}
    told = [path for path, content in contents.items() if b"5ec4e7" in content]
    assert told == []
    # All of it can be read as it lies there: it would have been found.
    names = {path.name for path in contents}
    assert {"result.json", "config.json", "metrics.jsonl", "last.ckpt", "best.ckpt"} <= names
    for suffix, known in ((".ckpt", b"state_dict"), (".wandb", b"evit_deit_micro")):
        (found, *_) = [content for path, content in contents.items() if path.suffix == suffix]
        assert known in found


def test_no_secret_is_on_the_page(finished):
    content = read(finished[0])
    assert len(content.runs) == 1
    assert "5ec4e7" not in page.html(content)


def test_a_run_that_is_tracked_listens_to_this_machine_alone(finished):
    watch = finished[2]
    assert "wandb-core" in watch.names
    assert watch.reachable == set()
