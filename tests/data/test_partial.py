"""A writer that is killed, wherever, is gone on with; two never write one file."""

import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import signal
import sys

import pytest

from evit.data.ffcv import partial
from evit.data.ffcv.format import check_beton
from evit.data.ffcv.write import write_beton

PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def commit_often(monkeypatch):
    monkeypatch.setattr(partial, "COMMIT_BYTES", 50_000)


def write(path, samples, **options):
    return write_beton(
        path, samples, **{"classes": ["a", "b", "c"], "source": "test", "num_workers": 1, **options}
    )


def killed(at, path, samples, **options):
    """Whether a process that writes the file was killed at its so manyeth fsync or renaming."""
    moments = itertools.count(1)

    def deadly(function):
        def call(*arguments):
            if next(moments) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    def run():
        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        write(path, samples, **options)

    process = PROCESSES.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def gone_on_after(output):
    """How many images were there already, by what was printed."""
    if "is there already" in output:
        return sys.maxsize
    return int(output.split("going on after ")[1].split()[0]) if "going on" in output else 0


def test_killed_anywhere_the_file_becomes_that_of_an_uninterrupted_writer(
    samples, written, tmp_path, capfd
):
    found = []
    for at in itertools.count(1):
        path = tmp_path / f"{at}" / "train.beton"
        if not killed(at, path, samples):
            break
        capfd.readouterr()
        write(path, samples)
        found.append(gone_on_after(capfd.readouterr().out))
        assert path.read_bytes() == written.read_bytes()
        assert check_beton(path, deep=True)["num_samples"] == len(samples)
        assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.json"}
    assert found[0] == 0 and found == sorted(found) and len(set(found)) > 2, found
    assert found[-1] > len(samples) / 2


def test_a_writer_that_is_killed_again_and_again_arrives(samples, written, tmp_path):
    path = tmp_path / "train.beton"
    assert killed(5, path, samples)
    attempts = 1
    while killed(5, path, samples):
        attempts += 1
        assert attempts < 10
    assert path.read_bytes() == written.read_bytes()


@pytest.fixture
def interrupted(samples, tmp_path):
    """A path whose writer was killed towards the end."""
    path = tmp_path / "train.beton"
    assert killed(6, path, samples)
    return path


@pytest.mark.parametrize("damage", ["torn line", "zeros", "lost data"])
def test_what_the_disk_lost_is_written_again(interrupted, samples, written, damage, capfd):
    journal = interrupted.with_name(".train.beton.journal")
    data = interrupted.with_name(".train.beton.partial")
    lines = journal.read_bytes()
    if damage == "torn line":
        journal.write_bytes(lines[:-5])
    elif damage == "zeros":
        journal.write_bytes(lines + bytes(300))
        data.write_bytes(data.read_bytes() + b"x" * 99_999)
    else:
        os.truncate(data, data.stat().st_size - 60_000)
    write(interrupted, samples)
    left = gone_on_after(capfd.readouterr().out)
    stored = lines.count(b"\n") - 1
    assert left == stored if damage == "zeros" else 0 < left < stored
    assert interrupted.read_bytes() == written.read_bytes()


def test_a_changed_image_is_seen_and_what_follows_it_is_written_again(
    interrupted, samples, tmp_path, capfd, picture
):
    copies = [(tmp_path / path.name, label) for path, label in samples]
    for (path, _), (copy, _) in zip(samples, copies, strict=True):
        os.link(path, copy)
    other = tmp_path / "other" / "train.beton"
    assert killed(6, other, copies)
    copies[20][0].unlink()
    picture(99, 50, 60).save(copies[20][0])
    capfd.readouterr()
    write(other, copies)
    assert gone_on_after(capfd.readouterr().out) == 20
    write(tmp_path / "fresh.beton", copies)
    assert other.read_bytes() == (tmp_path / "fresh.beton").read_bytes()


@pytest.mark.parametrize("change", ["fewer images", "other labels", "other options"])
def test_another_file_under_the_same_name_is_begun_anew(
    interrupted, samples, tmp_path, change, capfd
):
    options = {}
    if change == "fewer images":
        samples = samples[:-1]
    elif change == "other labels":
        samples = [(path, (label + 1) % 3) for path, label in samples]
    else:
        options = {"max_resolution": 60}
    write(interrupted, samples, **options)
    assert "going on" not in capfd.readouterr().out
    write(tmp_path / "fresh.beton", samples, **options)
    assert interrupted.read_bytes() == (tmp_path / "fresh.beton").read_bytes()


def test_after_an_error_what_is_written_is_kept(samples, tmp_path, capfd):
    path, bad = tmp_path / "new" / "train.beton", tmp_path / "bad.jpg"
    bad.write_text("not an image")
    with pytest.raises(ValueError, match="bad.jpg is not a readable image"):
        write(path, [*samples, (bad, 0)])
    assert "is kept: the same command goes on" in capfd.readouterr().err
    assert not path.exists()
    sidecar = write(path, [*samples, (bad, 0)], skip_bad=True)
    assert gone_on_after(capfd.readouterr().out) > len(samples) / 2
    assert sidecar["num_samples"] == len(samples) and len(sidecar["skipped"]) == 1
    with pytest.raises(ValueError, match="bad.jpg is not a readable image"):
        write(path, [*samples, (bad, 0)])


def test_a_disk_that_fills_up_is_told(samples, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(partial.os, "fsync", full)
    with pytest.raises(ValueError, match="is full: make room, lower max_resolution"):
        write(tmp_path / "train.beton", samples)


def test_a_file_that_is_there_is_left_alone_until_its_images_change(copied, samples):
    path = copied.with_name("again.beton")
    first, inode = write(path, samples), path.stat().st_ino
    assert write(path, samples) == first and path.stat().st_ino == inode
    assert write(path, samples[:-1])["num_samples"] == len(samples) - 1
    assert path.stat().st_ino != inode


def test_a_second_writer_waits_and_takes_what_the_first_has_written(samples, tmp_path):
    path = tmp_path / "train.beton"
    begun, waiting = PROCESSES.Event(), PROCESSES.Event()
    fsync, flock = os.fsync, fcntl.flock

    def first():
        def slow(file):
            begun.set()
            assert waiting.wait(20)
            fsync(file)

        os.fsync = slow
        write(path, samples)

    def second():
        def noticed(file, how):
            if how == fcntl.LOCK_EX:
                waiting.set()
            flock(file, how)

        def never(*_):
            raise AssertionError("written twice")

        fcntl.flock, os.replace = noticed, never
        (tmp_path / "second.json").write_text(json.dumps(write(path, samples)))

    processes = [PROCESSES.Process(target=target) for target in (first, second)]
    processes[0].start()
    assert begun.wait(20)
    processes[1].start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert json.loads((tmp_path / "second.json").read_text()) == check_beton(path, deep=True)


def test_a_file_system_without_locks_is_refused(samples, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(ValueError, match="without locks .*choose another folder"):
        write(tmp_path / "train.beton", samples)
