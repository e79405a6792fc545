"""tests/soak.py sees what grows; a run of minutes does not."""

import pytest

from tests.soak import growing, watch

STEADY = dict(memory=1000.0, files=40, threads=18)


def samples(**per_sample: float) -> list[dict]:
    """Forty samples of a run of ten steps a second, some of whose numbers grow."""
    return [
        {name: value + i * per_sample.get(name, 0) for name, value in STEADY.items()}
        | dict(minute=i, steps=600 * i, cpu_seconds=60 * i + i * i * per_sample.get("cpu", 0))
        for i in range(40)
    ]


def test_a_steady_run_is_not_growing():
    assert not growing(samples())


@pytest.mark.parametrize(
    ("what", "by", "said"),
    [
        ("memory", 5, "memory"),
        ("files", 1, "open files"),
        ("threads", 1, "threads"),
        ("cpu", 1, "CPU time"),
    ],
)
def test_what_grows_is_named(what, by, said):
    (found,) = growing(samples(**{what: by}))
    assert found.startswith(said)


@pytest.mark.slow
def test_a_run_of_minutes_holds_no_more_in_the_end_than_in_the_middle(tmp_path):
    assert not growing(watch(8, tmp_path, interval=5))
