"""A sweep of which some jobs fail, as a whole: what it says, leaves and repeats."""

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from evit.commands import jobs
from evit.commands import sweep as command
from evit.commands.jobs import Job
from evit.report import collect

# What a run leaves, but where keep_rate=0.5 is still to be killed.
RUN = """
import json, os
folder, config, source, rate = {!r}, {!r}, {!r}, {!r}
if rate == 0.5 and not os.path.exists("fixed"): os.kill(os.getpid(), 9)
os.chdir(folder)
open("begun", "a").write(".")
open("config.json", "w").write(config)
if source:
    first = json.load(open(source + "/result.json"))
    start = dict((key, first[key]) for key in ("top1", "top5", "loss"))
    open("start.json", "w").write(json.dumps(start))
result = dict(top1=float(len(open("begun").read())), top5=0, loss=0, train_images_per_s=0)
open("result.json", "w").write(json.dumps(result))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Run a sweep of lines, with small scripts as its runs: the exit status, and what it says."""
    monkeypatch.setattr(jobs, "SWEEPS", tmp_path)
    monkeypatch.setattr(Job, "command", property(script))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*lines: str, more: tuple[str, ...] = ()) -> tuple[int, str, str]:
        Path("mine.yaml").write_text(json.dumps(dict(runs=lines)))
        status = command.run(["mine", "name=mine", *more])
        return (status, *capsys.readouterr())

    return run


def script(job: Job) -> list[str]:
    source = job.source and str(job.source.absolute())
    values = str(job.folder), json.dumps(job.config), source, job.config["keep_rate"]
    return [sys.executable, "-S", "-c", RUN.format(*values)]


def begun() -> dict[str, int]:
    return {p.parent.name: len(p.read_text()) for p in Path().glob("outputs/mine/*/begun")}


def test_what_is_killed_or_does_not_compose_is_named_and_alone_repeated(sweep):
    lines = ["model=typo", "keep_rate=1,0.5", "seed=3"]
    words = "killed by signal 9 (SIGKILL): out of memory?"
    for finished in (0, 2):
        status, out, err = sweep(*lines)
        assert status == 1
        assert f"failed: job 2, keep_rate=0.5 name=mine: {words}" in err
        first, again, _ = err.splitlines()
        assert first == again and "job 0, model=typo" in first and "no model=typo" in first
        assert begun() == {"keep_rate-1": 1, "seed-3": 1}
        assert f"of which {finished} have finished before" in out
        *_, last = [line for line in out.splitlines() if "keep_rate=0.5" in line]
        assert last.split()[-1] == "failed"
    problems = collect.read(Path("outputs")).problems
    assert f"mine/keep_rate-0.5 has not finished: {words}" in problems
    status, out, err = sweep(*lines, more=("--dry-run", "job=0"))
    assert status == 1 and "broken" in out and "no model=typo" in err

    Path("fixed").touch()
    status, _, err = sweep("keep_rate=1,0.5", "seed=3")
    assert (status, err) == (0, "")
    assert begun() == {"keep_rate-1": 1, "keep_rate-0.5": 1, "seed-3": 1}
    assert not list(Path("outputs").rglob("failed.json"))


def test_a_run_is_repeated_after_the_one_that_it_starts_from_only_if_that_has_another_result(sweep):
    tuned = dict(run="seed=5", starts_from="seed=3")
    assert sweep("seed=3", tuned)[0] == 0
    (first,) = Path().glob("outputs/mine/seed-3")
    (second,) = Path().glob("outputs/mine/*seed-5*")
    counts = {first.name: 1, second.name: 1}
    assert begun() == counts
    (first / "result.json").unlink()
    (first / "begun").unlink()
    assert sweep("seed=3", tuned)[0] == 0 and begun() == counts  # the same result
    (first / "result.json").unlink()
    assert sweep("seed=3", tuned)[0] == 0 and begun() == {first.name: 2, second.name: 2}
    assert sweep("seed=3", tuned)[0] == 0 and begun() == {first.name: 2, second.name: 2}


LARGE = "model.embed_dim=12288 model.num_heads=96"  # 80 GB


@pytest.mark.slow
def test_of_real_runs_the_one_out_of_memory_and_the_killed_one_fail_alone(
    tmp_path, monkeypatch, capsys, shared_photos
):
    """The limit is on the address space of each process: what a process has mapped."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -v 16000000\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(jobs, "SWEEPS", tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    small = "model=evit_deit_micro img_size=28 recipe.batch_size=4 recipe.warmup_epochs=0 "
    small += "recipe.epochs=1 recipe.shrink_epochs=0 recipe.shrink_start_epoch=0 trainer=cpu "
    small += f"logger=none data.root={shared_photos} data.num_workers=0"
    runs = [f"{small} seed=0", f"{small} {LARGE}", "model=typo", f"{small} seed=7"]
    Path("mine.yaml").write_text(json.dumps(dict(runs=runs)))

    def kill():
        seeds: list[int] = []
        while 7 not in seeds:
            time.sleep(0.05)
            paths = tmp_path.glob("outputs/mine/*/config.json")
            seeds = [json.loads(path.read_text())["seed"] for path in paths]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if b"seed=7" in path.read_bytes() and (path.parent / "cwd").samefile(tmp_path):
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def sweep() -> tuple[int, str]:
        status = command.run(["mine", "name=mine"])
        return status, capsys.readouterr().err

    threading.Thread(target=kill, daemon=True).start()
    status, err = sweep()
    assert status == 1
    assert "job 1" in err and ("not enough memory" in err or "can't allocate memory" in err), err
    assert "killed by signal 9 (SIGKILL): out of memory?" in err and "no model=typo" in err
    (good,) = tmp_path.glob("outputs/mine/*/result.json")
    before = good.stat().st_mtime
    status, err = sweep()
    assert status == 1 and "SIGKILL" not in err and "no model=typo" in err
    assert len(list(tmp_path.glob("outputs/mine/*/result.json"))) == 2
    assert good.stat().st_mtime == before
