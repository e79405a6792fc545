"""Lines that say where a long work is."""

import functools
import time

from evit import files


def test_a_long_work_tells_where_it_is_until_it_ends(capsys):
    state = iter(range(1000))
    with files.telling(lambda: f"step {next(state)}", every=0.01):
        time.sleep(0.2)
    told = capsys.readouterr().out
    assert told.startswith("  step 0\n  step 1\n") and next(state) == told.count("\n")
    time.sleep(0.05)
    assert not capsys.readouterr().out


def test_what_has_nothing_to_say_prints_nothing(capsys):
    with files.telling(lambda: "", every=0.01):
        time.sleep(0.05)
    assert not capsys.readouterr().out


def test_off_a_terminal_a_loop_says_how_many_of_its_batches_are_done(capsys, monkeypatch):
    often = functools.partial(files.telling, every=0.01)
    monkeypatch.setattr(files, "telling", often)
    for _ in files.followed(range(3), "Writing x.beton", 3):
        time.sleep(0.1)
    told = capsys.readouterr().out.splitlines()
    assert list(dict.fromkeys(told)) == [f"  Writing x.beton: {i} of 3 batches" for i in range(3)]
