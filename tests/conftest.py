"""What the tests of commands share: a few photos in class folders, and a way to run src/*.py."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HEARD = (signal.SIGTERM, signal.SIGUSR1)  # ended with a line, as SIGINT is
ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["evit.commands.train", "evit.commands.use", "evit.commands.benchmark", "numba"]
)
# The smallest run that goes through every part.
QUICK = (
    "model=evit_deit_micro img_size=28 recipe.epochs=1 recipe.batch_size=4 recipe.lr=1e-3 "
    "recipe.warmup_epochs=0 recipe.shrink_start_epoch=0 recipe.shrink_epochs=0 "
    "recipe.ema_decay=null recipe.eval_every=1 trainer=cpu trainer.log_every_n_steps=1"
).split()


CLASSES = "cat dog elk fox gnu hen".split()


def write_photos(root: Path, train: int = 6, val: int = 3, classes: int = 2) -> Path:
    """ROOT/{train,val}/{cat,dog}/*.jpg: noise on a gray that tells the classes apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for level, name in zip(np.linspace(60, 190, classes, dtype=int), CLASSES, strict=False):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 50, level + 50, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture(scope="session")
def shared_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("shared") / "photos")


@pytest.fixture
def heard() -> Iterator[None]:
    """No signal is ignored, as some are by tests that run in the background."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in HEARD}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def small_disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 64 kB, or as large as the test says."""
    with tempfile.TemporaryDirectory() as folder:
        size = getattr(request, "param", "64k")
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no file system may be mounted here: {mounted.stderr}")
        yield Path(folder)
        subprocess.run(["umount", "-l", folder], check=True)


def command(script: str, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run python src/SCRIPT in a folder of the test's own.

    In a process of its own, forked from one that has paid for the imports of all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        argv = [str(ROOT / "src" / script), *arguments]
        child = FORKS.Process(target=run_script, args=(argv, cwd, env, streams))
        child.start()
        child.join(timeout=400)
        if child.is_alive():
            child.kill()
            raise TimeoutError(f"{argv} ran for 400 s:\n" + streams[1].read_text())
        shown = [stream.read_text() for stream in streams]
    return subprocess.CompletedProcess(argv, child.exitcode, *shown)


def run_script(argv: list[str], cwd: Path, env: dict[str, str], streams: tuple[Path, Path]) -> None:
    """Become python ARGV: what the child of command() does."""
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    for name in ("IMAGENET_DIR", "WANDB_MODE"):
        os.environ.pop(name, None)
    os.environ.update(env)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")


MINE = """
import torch
from evit.reducers import Reducer, Reduction


class Mine(Reducer):
    \"\"\"Keep the longest tokens.\"\"\"

    name, stage, selects = "mine", "input", True

    def __init__(self, power: float = 1.0, **schedule):
        super().__init__(**schedule)
        self.power = power

    def plan(self, i, seen, num_kept):
        score = seen.x_BTC[:, seen.num_prefix :].norm(dim=-1) ** self.power
        return Reduction(score.topk(num_kept).indices, seen.num_prefix)
"""


@pytest.fixture
def plug_in(tmp_path, monkeypatch) -> str:
    """--config-dir of a reducer from outside."""
    (tmp_path / "mypackage.py").write_text(MINE)
    (tmp_path / "conf/reducer").mkdir(parents=True)
    node = "_target_: mypackage.Mine\nkeep_rate: ${keep_rate}\npower: 1.0\n"
    (tmp_path / "conf/reducer/mine.yaml").write_text(node)
    monkeypatch.syspath_prepend(tmp_path)
    return f"--config-dir={tmp_path}/conf"
