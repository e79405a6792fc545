"""When one of two processes ends, so does the other, and the terminal says why."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evit.commands.processes import RANKS
from evit.training import peers
from tests.conftest import FORKS, QUICK, ROOT

TORCHRUN = [*("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")]
LAUNCHERS = {"lightning": [], "torchrun": TORCHRUN}
# A run of src/train.py in which one process has a batch that is not a number.
SPOILT = f"""
import math, sys
sys.path.insert(0, {str(ROOT / "src")!r})
import train
from evit.training.module import Classifier
step = Classifier.training_step
def training_step(self, batch, batch_idx):
    if (self.global_rank, self.global_step) == (1, 3):
        batch[0][:] = math.nan
    return step(self, batch, batch_idx)
Classifier.training_step = training_step
train.main()
"""


def until(true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


class Pair:
    """A run of two processes, and all that belong to it."""

    def __init__(self, launcher: str, folder: Path, root: Path, *more: str, script=None):
        script = script or ROOT / "src/train.py"
        ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=none"]
        quick = [argument for argument in QUICK if argument != "trainer=cpu"]
        arguments = [*quick, *ddp, "recipe.epochs=10000", f"data.root={root}", *more]
        self.folder, self.mark = folder, f"PAIR={folder}"
        left_out = ("IMAGENET_DIR", *RANKS)  # those of other tests
        kept = {k: v for k, v in os.environ.items() if k not in left_out}
        with (folder / "stderr").open("w") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, *LAUNCHERS[launcher], str(script), *arguments],
                cwd=folder,
                env=kept | dict(PAIR=str(folder)),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )

    def environments(self) -> dict[int, list[str]]:
        """Of each process of this run that is alive."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_text(errors="replace").split("\0")
                alive = "State:\tZ" not in (path.parent / "status").read_text()
            except OSError:
                continue
            if self.mark in variables and alive:
                found[int(path.parent.name)] = variables
        return found

    def process(self, rank: int) -> int:
        """The id of the training process of a rank."""
        ranks = [p for p, e in self.environments().items() if f"LOCAL_RANK={rank}" in e]
        return min(ranks, default=self.popen.pid)

    def trains(self) -> bool:
        assert self.popen.poll() is None, (self.folder / "stderr").read_text()
        paths = list(self.folder.glob("outputs/*/*/metrics.jsonl"))
        return bool(paths) and len(paths[0].read_text().splitlines()) > 3

    def ended(self, seconds: float) -> str:
        """What it says, when it has ended within so many seconds, and no process is left of it."""
        assert self.popen.wait(timeout=seconds) != 0
        until(lambda: not self.environments(), 30)
        assert not list(self.folder.glob("outputs/*/*/result.json"))
        return (self.folder / "stderr").read_text()


@pytest.fixture
def start(tmp_path, shared_photos):
    pairs = []

    def start(launcher: str, *more: str, root: Path = shared_photos, script=None) -> Pair:
        pairs.append(Pair(launcher, tmp_path, root, *more, script=script))
        return pairs[-1]

    yield start
    for pair in pairs:
        for process in pair.environments():
            os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_when_a_process_is_killed_the_other_ends_with_an_error(launcher, rank, start):
    pair = start(launcher)
    until(pair.trains, 200)
    os.kill(pair.process(rank), signal.SIGKILL)
    said = pair.ended(60)
    if launcher == "torchrun":  # which ends the other, if that has not noticed before
        assert re.search(rf"Root Cause.* rank +: {rank} .*Signal 9 \(SIGKILL\)", said, re.DOTALL), (
            said
        )
        assert rank == 0 or "stopped by SIGTERM" in said or "error: the other proc" in said, said
    else:
        how = " (SIGKILL)" if rank == 1 else ""
        assert said == f"error: process {rank} has ended{how}, and so do the others\n"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_image_that_one_process_cannot_read_ends_both_and_is_named_once(
    launcher, start, tmp_path, photos
):
    sampler = torch.utils.data.DistributedSampler(range(12), num_replicas=2, rank=1, seed=0)
    sampler.set_epoch(1)
    number = list(sampler)[0]
    path = photos / "train" / ("cat", "dog")[number // 6] / f"{number % 6}.jpg"
    path.write_bytes(path.read_bytes()[:300])
    said = start(launcher, "data.backend=imagefolder", root=photos).ended(200)
    assert said.count(f"{path} is not a readable image") == 1, said
    assert "error: " in said


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_loss_of_one_process_that_is_not_finite_ends_both_and_is_said_once(
    launcher, start, tmp_path
):
    script = tmp_path / "spoilt.py"
    script.write_text(SPOILT)
    said = start(launcher, script=script).ended(200)
    assert said.count("error: the loss is nan (epoch 2/10000, step 4, ") == 1, said
    assert said.count("for images of process 1: ") == 1 and "of process 0" not in said


def stuck_with_children(folder: Path) -> None:
    peers.GRACE = 0.2
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    children = [subprocess.Popen(["sleep", "100"]) for _ in range(2)]
    (folder / "pid").write_text(str(children[0].pid))
    peers.watch_children(children)
    children[1].kill()
    time.sleep(100)


def test_a_process_that_waits_for_ever_ends_when_one_that_it_has_started_has(tmp_path):
    """As in a collective operation on GPUs, which does not notice."""
    process = FORKS.Process(target=stuck_with_children, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    said = (tmp_path / "stderr").read_text()
    assert said == "error: process 2 has ended (SIGKILL), and so do the others\n"
    other = Path("/proc", (tmp_path / "pid").read_text(), "status")
    until(lambda: not other.exists() or "State:\tZ" in other.read_text(), 10)


def start_another(folder: Path) -> None:
    peers.GRACE = 0.2
    peers.watch_parent()
    if os.fork() == 0:
        os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        os.environ["LOCAL_RANK"] = "1"
        peers.watch_parent()
        time.sleep(100)
    os._exit(1)


def test_a_process_that_waits_for_ever_ends_when_the_one_that_started_it_has(tmp_path):
    process = FORKS.Process(target=start_another, args=(tmp_path,))
    process.start()
    process.join(60)
    path = tmp_path / "stderr"
    until(lambda: path.exists() and path.read_text().endswith("\n"), 30)
    assert path.read_text() == "error: process 0 has ended, and so do the others\n"


def done_before_a_child_fails() -> None:
    peers.GRACE = 0.1
    peers.watch_children([subprocess.Popen(["false"])])
    peers.done()
    time.sleep(2)
    os._exit(0)


def test_a_process_that_is_done_is_not_ended_by_one_that_fails_later():
    process = FORKS.Process(target=done_before_a_child_fails)
    process.start()
    process.join(60)
    assert process.exitcode == 0
