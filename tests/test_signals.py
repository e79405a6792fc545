"""Signals: the first ends the program, once; what was ignored stays so."""

import os
import signal
import subprocess
import sys

import pytest

from evit import ending, signals
from tests.conftest import FORKS, ROOT

pytestmark = pytest.mark.usefixtures("heard")


@pytest.mark.parametrize("number", signals.ENDING)
def test_the_first_is_raised_and_those_after_it_do_nothing(number):
    before = signal.getsignal(number)
    with pytest.raises(signals.Stopped, match=signal.Signals(number).name):
        with signals.stopping(*signals.ENDING):
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received.number == number
    assert signal.getsignal(number) == before


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stopping(*signals.ENDING):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_that_a_destructor_has_swallowed_is_raised_later():
    class Swallows:
        def __del__(self):
            with pytest.raises(signals.Stopped):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(signals.Stopped):
        with signals.stopping(*signals.ENDING):
            Swallows()
            signals.check()


def worker(number: int) -> None:
    with signals.stopping(*signals.ENDING):
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), number)
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_a_worker_is_ended_by_sigterm_and_leaves_a_ctrl_c_to_its_parent(number, status):
    program = FORKS.Process(target=worker, args=(number,))
    program.start()
    program.join()
    assert program.exitcode == status


def test_a_ctrl_c_while_a_command_imports_shows_no_traceback():
    code = "import os, startup; os.kill(os.getpid(), 2)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


@pytest.mark.parametrize(
    ("number", "procid", "local", "requeued"),
    [
        (signal.SIGUSR1, "0", "0", ["scontrol requeue 7"]),
        (signal.SIGUSR1, "1", "1", []),
        (signal.SIGTERM, "0", "0", []),
    ],
)
def test_sigusr1_requeues_a_job_of_slurm_once_and_one_process_says_so(
    number, procid, local, requeued, monkeypatch, tmp_path, capsys
):
    for name, value in dict(JOB_ID="7", PROCID=procid, LOCALID=local).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(signals, "received", signals.Stopped(number))
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command: ran.append(" ".join(command)))
    with pytest.raises(SystemExit) as ended:
        ending.end_run(signals.received, tmp_path, resumes=True, one=True)
    assert (ended.value.code, ran) == (128 + number, requeued)
    assert capsys.readouterr().err.count("stopped by") == (local == "0")


def test_a_run_folder_that_another_process_has_removed_is_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ending.remove_empty(tmp_path / "outputs/micro/0")
