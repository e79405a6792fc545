"""A command starts a process for each device; when one ends so do the others, and it says why."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evit.commands import sweep
from tests.conftest import QUICK, ROOT

TORCHRUN = [*("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")]
LAUNCHERS = {"by itself": [], "torchrun": TORCHRUN}
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
        left_out = sweep.LAUNCHERS  # those of other tests
        kept = {k: v for k, v in os.environ.items() if not left_out.match(k)}
        kept.pop("IMAGENET_DIR", None)
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
    if launcher == "torchrun":
        found = rf"Root Cause.* rank +: {rank} .*Signal 9 \(SIGKILL\)"
        assert re.search(found, said, re.DOTALL), said
    else:
        assert said == f"error: process {rank} has ended (SIGKILL), and so have the others\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_when_the_command_is_ended_no_process_is_left(number, start):
    pair = start("by itself")
    until(pair.trains, 200)
    pair.popen.send_signal(number)
    said = pair.ended(60)
    assert said == ("stopped by SIGTERM\n" if number == signal.SIGTERM else "")


def test_a_command_with_two_devices_trains_in_two_processes(start, tmp_path):
    pair = start("by itself", "recipe.epochs=1")
    assert pair.popen.wait(timeout=300) == 0, (tmp_path / "stderr").read_text()
    (path,) = tmp_path.glob("outputs/*/*/result.json")
    assert json.loads(path.read_text())["processes"] == 2
    assert (tmp_path / "stderr").read_text() == ""


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
    script = tmp_path / "train.py"  # the command is named after it
    script.write_text(SPOILT)
    said = start(launcher, script=script).ended(200)
    assert said.count("error: the loss is nan (epoch 2/10000, step 4, ") == 1, said
    assert said.count("for images of process 1: ") == 1 and "of process 0" not in said
