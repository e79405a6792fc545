"""Sweeps on a real SLURM, of this machine's own: `make test-slurm` starts it, and stops it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_photos

pytestmark = pytest.mark.slurm
SMALL = (
    "model=evit_deit_micro img_size=28 recipe.batch_size=4 recipe.warmup_epochs=0 "
    "recipe.max_train_images=null recipe.epochs=5 trainer.accelerator=cpu "
    "data=folder data.backend=imagefolder data.num_workers=0 logger=none "
    "checkpoint_every_n_steps=5 launcher=slurm "
    "slurm.gpus_per_node=null slurm.cpus_per_task=1 slurm.timeout_min=20 slurm.slurm_partition=low"
).split()


# src/train.py, which from its 12th step on (with checkpoints every 5) waits for a file. As `python`
# in the command line of a job it takes the place of Python.
WAITING = """#!{python}
import os, sys, time
arguments = sys.argv[1:]
if not arguments[0].endswith("src/train.py"):
    os.execv({python!r}, [{python!r}, *arguments])
import runpy
import lightning as L

class Wait(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        while trainer.global_step >= 12 and not os.path.exists({gate!r}):
            time.sleep(0.1)

def fit(self, *arguments, fit=L.Trainer.fit, **options):
    self.callbacks.append(Wait())
    return fit(self, *arguments, **options)

L.Trainer.fit = fit
sys.executable, sys.argv = {python!r}, arguments
sys.path.insert(0, os.path.dirname(arguments[0]))
runpy.run_path(arguments[0], run_name="__main__")
"""
# src/sweep.py, for whose jobs another program is Python.
AS_PYTHON = """import runpy, sys
_, sys.executable, *sys.argv = sys.argv
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), train=60, val=4)


def waiting_python(folder: Path) -> Path:
    """A Python whose training waits for folder/go."""
    path = folder / "python"
    path.write_text(WAITING.format(python=sys.executable, gate=str(folder / "go")))
    path.chmod(0o755)
    return path


def sweep(folder: Path, photos: Path, *more: str, python: str | Path = sys.executable) -> str:
    script = str(ROOT / "src/sweep.py")
    words = [
        sys.executable,
        "-c",
        AS_PYTHON,
        str(python),
        script,
        "cifar10_resolution",
        *SMALL,
        *more,
    ]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    words.append(f"data.root={photos}")
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait(folder: Path, pattern: str, count: int) -> list[Path]:
    """Until there are so many files; and fail when SLURM has nothing to do any more."""
    idle = 0
    while len(found := list(folder.glob(f"outputs/cifar10/*/{pattern}"))) < count:
        idle = 0 if slurm("squeue", "-h") else idle + 1
        logs = "".join(path.read_text() for path in folder.glob("outputs/slurm/*/*/*.err"))
        assert idle < 5, f"{len(found)} of {count}:\n{logs}"
        time.sleep(1)
    return found


def wait_for_a_restart() -> None:
    """Until SLURM has put a job of the array back into the queue."""
    for _ in range(300):
        if any("Restarts=1" in job for job in jobs_of_the_array()):
            return
        time.sleep(1)
    raise AssertionError(f"no job was preempted: {jobs_of_the_array()}")


def jobs_of_the_array() -> list[str]:
    found = slurm("scontrol", "show", "job").split("\n\n")
    return [job for job in found if "ArrayTaskId" in job]


def test_two_tasks_are_the_processes_of_one_run_which_goes_on_after_the_end_of_its_time(
    tmp_path, photos
):
    shown = sweep(tmp_path, photos, "slurm.tasks_per_node=2", "keep_rate=0.5", "seed=0", "job=0")
    job = shown.split("submitted as ")[1].split(":")[0]
    wait(tmp_path, "checkpoints/last.ckpt", 1)
    slurm("scancel", "--signal=USR2", job)  # as SLURM does before the end
    (path,) = wait(tmp_path, "result.json", 1)
    assert json.loads(path.read_text())["processes"] == 2
    assert "Restarts=1" in slurm("scontrol", "show", "job", job)
    logs = [path.read_text() for path in tmp_path.glob("outputs/slurm/*/*/*.out")]
    assert sum("Going on from" in log for log in logs) == 1


def test_a_preempted_job_of_a_sweep_is_requeued_and_goes_on(tmp_path, photos):
    rates = ["keep_rate=0.9,0.7", "seed=0,1", "fusion=true"]
    python = waiting_python(tmp_path)  # no job ends before it is to
    shown = sweep(tmp_path, photos, *rates, python=python)
    assert "4 runs submitted, 0 in the queue" in shown
    assert "0 runs submitted, 4 in the queue" in sweep(tmp_path, photos, *rates, python=python)
    wait(tmp_path, "checkpoints/last.ckpt", 2)  # both that there is room for
    slurm("sbatch", "-p", "high", "-n1", "-o", "/dev/null", "--wrap", "sleep 3")
    wait_for_a_restart()
    (tmp_path / "go").touch()
    paths = wait(tmp_path, "result.json", 4)
    assert sum("Restarts=1" in job for job in jobs_of_the_array()) == 1
    logs = [path.read_text() for path in tmp_path.glob("outputs/slurm/*/*/*.out")]
    assert sum("Going on from" in log for log in logs) == 1
    assert len(paths) == 4
    assert "0 runs submitted, 0 in the queue" in sweep(tmp_path, photos, *rates)
