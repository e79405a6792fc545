"""Progress: a bar on a terminal, lines elsewhere."""

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
    assert list(shown(range(100), 100, "Writing")) == list(range(100))
    assert capsys.readouterr().out.splitlines() == [
        "Writing: 40/100, 1 images/s, 0:01:00 left",
        "Writing: 80/100, 1 images/s, 0:00:20 left",
        "Writing: 100/100, 1 images/s, 0:00:00 left",
    ]


def test_on_a_terminal_it_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(shown(range(10), 10, "Writing")) == list(range(10))
    assert "100%" in (out := capsys.readouterr().out) and "━" in out and "10 images" in out
