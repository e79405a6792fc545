"""A run that signals end, or a disk, goes on by the same command; and says so in one line."""

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from evit.training import callbacks
from tests.conftest import HEARD, ROOT
from tests.training.conftest import ARGUMENTS, assert_equal, only, rows, training_state

pytestmark = pytest.mark.usefixtures("heard")
ENDING = (*HEARD, signal.SIGINT)
SAID = "stopped by {}: the same command goes on\n"


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_a_run_with_one_line(number, train, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, kill_at=(1, 1), kill=send(number))
    assert ended.value.code == 128 + number
    assert capfd.readouterr().err == SAID.format(signal.Signals(number).name)


def test_before_the_first_checkpoint_it_does_not_promise_to_go_on(train, tmp_path, capfd):
    with pytest.raises(SystemExit):
        train(tmp_path, kill_at=(0, 1), kill=send(signal.SIGINT))
    assert capfd.readouterr().err == "stopped by SIGINT\n"


def test_sigusr1_ends_a_job_of_slurm_as_elsewhere_and_requeues_it(
    train, tmp_path, capfd, monkeypatch
):
    """Lightning's handler would save a checkpoint that is never read, and go on."""
    slurm = dict(NTASKS="1", JOB_NAME="train", JOB_ID="7", STEP_ID="0", PROCID="0", LOCALID="0")
    for name, value in (
        slurm | dict(NODEID="0", NTASKS_PER_NODE="1", NODELIST="localhost")
    ).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho $@ >&2\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, kill_at=(1, 1), kill=send(signal.SIGUSR1))
    assert ended.value.code == 128 + signal.SIGUSR1
    assert capfd.readouterr().err == "requeue 7\n" + SAID.format("SIGUSR1")
    assert not list(tmp_path.rglob("hpc_ckpt*"))


def test_a_run_that_a_signal_ends_is_not_a_success_in_wandb(train, tmp_path):
    online = ("logger=wandb", "logger.mode=offline")
    with pytest.raises(SystemExit):
        train(tmp_path, *online, kill_at=(0, 1), kill=send(signal.SIGINT))
    path, codes, until = only(tmp_path, "wandb/offline-run-*/*.wandb"), [], time.monotonic() + 60
    while not codes and time.monotonic() < until:  # W&B's process writes it when it has time
        records = wandb_records(path.read_bytes())
        codes = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    assert codes == [1]


def wandb_records(content: bytes) -> list[Record]:
    """What is in a .wandb file: after 7 bytes, LevelDB's log format."""
    records, position, parts = [], 7, b""
    while position + 7 <= len(content):
        if 2**15 - position % 2**15 < 7:  # a header does not cross blocks
            position += 2**15 - position % 2**15
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if position + 7 + length > len(content):  # being written
            break
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.parametrize("small_disk", ["160m"], indirect=True)  # a checkpoint takes 22
def test_a_full_disk_is_named_and_with_room_the_same_command_goes_on(
    train, whole, small_disk, capfd
):
    filler = small_disk / "filler"

    def fill():
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 10 * 2**20))

    with pytest.raises(SystemExit) as ended:
        train(small_disk, kill_at=(1, 5), kill=fill)
    folder = only(small_disk, "checkpoints")
    shown, named = capfd.readouterr().err, (folder / "epoch_002.ckpt").relative_to(small_disk)
    assert ended.value.code == 2
    assert shown.count("\n") == 1 and shown.startswith(
        f"error: {named} cannot be used: No space left"
    )
    assert training_state(small_disk)["step"] == 4
    assert not [path.name for path in folder.iterdir() if path.suffix != ".ckpt"]
    filler.unlink()
    assert "Going on from" in train(small_disk)
    assert_equal(small_disk, whole)


def a_file(outputs: Path) -> None:
    outputs.touch()


def read_only(outputs: Path) -> None:
    outputs.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(outputs)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr}")


@pytest.mark.parametrize(
    ("make", "reason"), [(a_file, "Not a directory"), (read_only, "Read-only file system")]
)
def test_outputs_that_cannot_be_written_are_named_before_anything_is_done(
    make, reason, train, tmp_path, capfd
):
    make(tmp_path / "outputs")
    try:
        with pytest.raises(SystemExit) as ended:
            train(tmp_path)
    finally:
        if os.path.ismount(tmp_path / "outputs"):
            subprocess.run(["umount", tmp_path / "outputs"], check=True)
    assert ended.value.code == 2
    shown = capfd.readouterr().err
    assert shown.count("\n") == 1 and f"cannot be used: {reason}. Make room or choose" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


class Program:
    """A process of src/train.py, in a session of its own as a sweep's jobs are."""

    def __init__(self, folder: Path, *arguments: str):
        command = [sys.executable, ROOT / "src/train.py", *ARGUMENTS, *arguments]
        env = {k: v for k, v in os.environ.items() if k != "IMAGENET_DIR"}
        self.folder, self.log = folder, folder / "log"
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for(self, pattern: str) -> None:
        """Until there is such a file in the folder of the run, or it has ended."""
        while self.popen.poll() is None and not list(self.folder.glob(f"outputs/*/*/{pattern}")):
            time.sleep(0.0005)


def when(program: Program, rng: random.Random) -> None:
    """Wait for a random moment: of the start, of training, or of a checkpoint's writing."""
    moment = rng.choice(["start", "training", "checkpoint"])
    if moment == "start":
        time.sleep(rng.uniform(0.3, 10))
    elif moment == "training":
        program.wait_for("metrics.jsonl")
        time.sleep(rng.uniform(0, 2))
    else:
        program.wait_for(rng.choice(["checkpoints/next.ckpt.tmp", "checkpoints/best.ckpt.tmp"]))
        time.sleep(rng.uniform(0, 0.05))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_program_killed_at_ten_random_moments_equals_one_that_was_not(
    seed, train, whole, shared_photos, tmp_path_factory
):
    """Of the process, or of all that it has started, as a sweep does."""
    rng, folder = random.Random(seed), None
    numbers = [signal.SIGKILL, signal.SIGHUP, *ENDING] * 2
    rng.shuffle(numbers)
    while numbers:
        folder = folder or tmp_path_factory.mktemp("killed")
        program = Program(folder, f"data.root={shared_photos}")
        when(program, rng)
        number, log = numbers[0], program.log
        if program.popen.poll() is None:
            rng.choice([os.kill, os.killpg])(program.popen.pid, number)
        status = program.popen.wait(300)
        shown = log.read_text()
        assert "Traceback" not in shown, shown
        if status:
            assert status in (128 + number, -number), shown
            if status > 0:
                assert f"stopped by {signal.Signals(number).name}" in shown.splitlines()[-1], shown
            numbers.pop(0)
            lost(folder)
        else:
            assert_equal(folder, whole)
            folder = None
    if folder:
        train(folder)
        assert_equal(folder, whole)


def lost(folder: Path) -> None:
    """Assert that no more than the running epoch has to be repeated."""
    if not list(folder.glob("outputs/*/*/metrics.jsonl")):
        return
    run = only(folder, "metrics.jsonl").parent
    lines = [row["step"] for row in rows(folder)]
    _, saved = callbacks.unfinished(run)
    assert saved >= max(lines, default=0) // 3 * 3
