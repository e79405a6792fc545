"""How soon a training begins: what is imported until then, in which order, and under which garbage
collector. Nothing here is timed; docs/speed.md has the times."""

import json
import re
import subprocess
import sys

import pytest

from tests.conftest import QUICK, ROOT, command

BEGIN = """
import gc, json, sys
import train
sys.argv[0] = "train.py"
def facts(*_):
    print(json.dumps([gc.isenabled(), list(sys.modules)]))
    sys.exit()

import importlib
module = importlib.import_module
def imported(name, *more, **package):
    found = module(name, *more, **package)
    if name == "evit.commands.train":
        found.run = facts
    return found
importlib.import_module = imported
train.main()
"""


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """At the beginning of a run: the collector's state, and the modules in the order of import."""
    folder = tmp_path_factory.mktemp("begin")
    done = subprocess.run(
        [sys.executable, "-c", BEGIN, f"hydra.run.dir={folder}"],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


# Only FFCV needs numba; the others are for reports, exports and sweeps.
UNUSED = (
    "numba ffcv cv2 plotly wandb_workspaces onnx onnxruntime onnxscript submitit sklearn "
    "IPython tensorboard evit.report.page evit.commands.use evit.commands.sweep "
    "torch._inductor.compile_fx"
)


@pytest.mark.parametrize("name", UNUSED.split())
def test_a_run_begins_without(begin, name):
    assert name not in begin[1]


def test_garbage_is_searched_for_again(begin):
    assert begin[0]


def test_scipy_is_not_required_as_torchmetrics_would_import_it_every_time():
    assert "scipy" not in re.split(r"==.*\n", (ROOT / "requirements.txt").read_text())


def test_the_documented_timing_ends_at_the_first_batch(shared_photos, tmp_path):
    knobs = [*QUICK, f"data.root={shared_photos}", "logger=none"]
    done = command("../tests/first_batch.py", *knobs, cwd=tmp_path)
    assert done.returncode == 0 and "Training on photos" in done.stdout, done.stderr
    assert not list(tmp_path.rglob("result.json"))
