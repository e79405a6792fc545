"""Runs as processes: here small scripts, which leave what a run leaves."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from evit.commands import ended_in_a_line, sweep
from evit.commands.jobs import Job
from tests.conftest import ROOT

DONE = "open('result.json', 'w').write('{}')"
BEGIN = "import os, time; open('config.json', 'w').write('{}'); open('begun', 'a').write('.'); "


@dataclass
class Script(Job):
    """A job that runs Python code in its folder."""

    code: str = ""

    @property
    def command(self):
        return [
            sys.executable,
            "-S",
            "-c",
            f"import os; os.chdir({str(self.folder)!r}); {self.code}",
        ]


def script(folder: Path, code: str, **more) -> Script:
    overrides = [f"name={folder.name}"]
    return Script("train", overrides, folder, code=BEGIN + code, **more)


def run(jobs, slots=1):
    return sweep.run_all(jobs, slots)


def begun(job: Job) -> int:
    path = job.folder / "begun"
    return len(path.read_text()) if path.exists() else 0


def test_a_failing_job_does_not_stop_the_others_and_is_named_with_its_last_line(tmp_path):
    bad = script(tmp_path / "bad", "print('it broke\\n'); os._exit(3)")
    good = script(tmp_path / "good", DONE)
    ((failed, reason),) = run([bad, good])
    assert failed is bad and reason == "exit status 3: it broke"
    assert good.state() == "finished"


def test_a_killed_job_is_named_in_words_and_not_with_an_error_of_before(tmp_path):
    code = "print('ValueError: ignored', flush=True); os.kill(os.getpid(), 9)"
    jobs = [script(tmp_path / "killed", code), script(tmp_path / "good", DONE)]
    ((_, reason),) = run(jobs)
    assert reason == "killed by signal 9 (SIGKILL): out of memory?"
    assert json.loads((jobs[0].folder / "failed.json").read_text())["reason"] == reason
    crashed = script(tmp_path / "crashed", "print('last', flush=True); os.kill(os.getpid(), 11)")
    ((_, reason),) = run([crashed])
    assert reason == "killed by signal 11 (SIGSEGV): last"


def test_a_job_without_enough_memory_is_named_with_its_error(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28)); "
    catch = "import atexit; atexit.register(print, 'the last line'); "
    job = script(tmp_path / "large", f"{limit}{catch}bytearray(1 << 30)")
    ((_, reason),) = run([job, script(tmp_path / "good", DONE)])
    assert reason == "exit status 1: MemoryError"


def test_the_reason_is_of_the_last_try_and_goes_away_with_the_next(tmp_path):
    code = f"n = len(open('begun').read()); n == 1 and 1 / 0; n == 2 and os._exit(3); {DONE}"
    job = script(tmp_path / "job", code)
    run([job])
    ((_, reason),) = run([job])
    assert reason == "exit status 3"
    assert not run([job]) and not (job.folder / "failed.json").exists()


def test_a_job_that_ends_well_without_a_result_has_failed(tmp_path):
    ((_, reason),) = run([script(tmp_path / "none", "print('bye')")])
    assert reason == "exit status 0: bye"


def test_what_a_job_has_started_ends_with_it(tmp_path):
    child = "import subprocess; p = subprocess.Popen(['sleep', '600']); "
    child += "f = open('pid', 'w'); f.write(str(p.pid)); f.close(); "
    job = script(tmp_path / "long", f"{child}os._exit(3)")
    ((_, reason),) = run([job])
    assert reason == "exit status 3"
    status = Path(f"/proc/{(job.folder / 'pid').read_text()}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_as_many_jobs_run_at_once_as_there_are_slots(tmp_path):
    """Each waits for a second one to begin, and notes how many run beside it."""
    code = "import glob, time\n"
    code += "while len(glob.glob('../*/begun')) < 2: time.sleep(0.01)\n"
    code += "n = len(glob.glob('../*/begun')) - len(glob.glob('../*/result.json'))\n"
    code += f"open('most', 'w').write(str(n)); {DONE}"
    jobs = [script(tmp_path / str(i), f"exec({code!r})", number=i) for i in range(5)]
    assert not run(jobs, slots=2)
    assert max(int(path.read_text()) for path in tmp_path.glob("*/most")) == 2


def test_each_slot_has_its_gpus(tmp_path, monkeypatch):
    assert sweep.make_slots([0, [1, 2]]) == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "1,2"},
    ]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in sweep.make_slots(2)] == ["0,2", "1,3"]
    assert sweep.make_slots(1) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in sweep.make_slots(2)] == ["5", "5"]
    with pytest.raises(ValueError, match="slots must be"):
        sweep.make_slots(0)


def test_a_run_does_not_see_the_launcher_of_the_sweep(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WANDB_SWEEP_ID", "x")
    code = f"import json; json.dump(dict(os.environ), open('env', 'w')); {DONE}"
    job = script(tmp_path / "job", code)
    assert not run([job], slots=[3])
    env = json.loads((job.folder / "env").read_text())
    assert not {"RANK", "WORLD_SIZE", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"} & set(env)
    assert env["WANDB_SWEEP_ID"] == "x" and env["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_job_waits_for_the_one_that_it_starts_from(tmp_path):
    first = script(tmp_path / "first", f"time.sleep(0.3); {DONE}")
    code = f"assert os.path.exists('../first/result.json'); {DONE}"
    assert not run([script(tmp_path / "second", code, source=first.folder), first], slots=2)


def test_a_job_is_not_begun_where_the_one_that_it_starts_from_has_failed(tmp_path):
    first = script(tmp_path / "first", "os._exit(1)")
    second = script(tmp_path / "second", DONE, source=first.folder)
    failed = run([first, second], slots=2)
    assert [job for job, _ in failed] == [first, second] and not begun(second)


def test_a_signal_stops_the_jobs_and_leaves_them_to_be_taken_up_again(tmp_path):
    good = script(tmp_path / "good", DONE)
    long = script(tmp_path / "long", f"os.path.exists('../go') or time.sleep(600); {DONE}")

    def stop_it():
        while not begun(long):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_it).start()
    with pytest.raises(SystemExit), ended_in_a_line():
        run([good, long])
    assert good.state() == "finished" and long.state() == "missing"
    (tmp_path / "go").touch()
    assert not run([job for job in (good, long) if job.state() != "finished"])
    assert (begun(good), begun(long)) == (1, 2)


def test_a_job_that_outlives_its_sweep_is_not_begun_twice(tmp_path):
    job = script(tmp_path / "alive", "time.sleep(600)")
    sweep.start(job, {})
    try:
        ((_, reason),) = run([job])
        assert "runs already" in reason
    finally:
        sweep.stop([job.popen])


def test_there_is_a_line_for_each_event(tmp_path, capsys):
    run([script(tmp_path / "a", DONE, number=4)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("job 4 running: name=a") and second.startswith("job 4 finished: name=a")


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_killed_and_then_runs_nothing(tmp_path):
    small = (
        "data=fashion_mnist recipe.max_train_images=256 recipe.max_val_images=64 recipe.epochs=1 "
        "recipe.shrink_epochs=0 trainer=cpu logger=none seed=0 keep_rate=0.5,1 job=[0,1]"
    )
    words = [*small.split(), f"data.cache_dir={tmp_path}/data"]
    command = [sys.executable, str(ROOT / "src/sweep.py"), "cifar10_resolution", *words]

    def sweep() -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)

    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("outputs/*/*/result.json")):
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(90) == 128 + signal.SIGTERM
    before = {path: path.stat().st_mtime for path in tmp_path.glob("outputs/*/*/result.json")}
    assert len(before) == 1
    done = sweep()
    assert done.returncode == 0, done.stdout + done.stderr
    found = list(tmp_path.glob("outputs/cifar10/*/result.json"))
    assert {json.loads(path.read_text())["config"]["keep_rate"] for path in found} == {0.5, 1}
    assert all(path.stat().st_mtime == time for path, time in before.items())
    assert "have finished before" in (again := sweep()).stdout
    assert not [line for line in again.stdout.splitlines() if line.startswith("job ")]
