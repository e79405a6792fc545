"""Progress: a bar in a terminal, lines elsewhere."""

import pytest

from evit.data import progress
from evit.data.progress import shown


@pytest.fixture
def clock(monkeypatch):
    """A second passes from look to look."""
    seconds = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))


def test_off_a_terminal_lines_tell_the_speed_and_the_time_left(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 40)
    assert list(shown(range(100), 200, "Writing", done=100)) == list(range(100))
    assert capsys.readouterr().out.splitlines() == [
        "Writing: 140/200, 1 images/s, 0:01:00 left",
        "Writing: 180/200, 1 images/s, 0:00:20 left",
        "Writing: 200/200, 1 images/s, 0:00:00 left",
    ]


def test_in_a_terminal_it_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    list(shown(range(10), 30, "Writing", done=20))
    assert "30/30" in (out := capsys.readouterr().out) and "━" in out and "images/s" in out


def test_without_progress_nothing_is_shown(capsys):
    assert list(shown(range(3), 3, "Writing", enabled=False)) == [0, 1, 2]
    assert capsys.readouterr().out == ""
