"""Time and memory of steps: what takes turns, and what is counted."""

import numpy as np
import pytest
import torch

from evit.measure import speed

CPU = torch.device("cpu")


def test_in_every_round_all_steps_have_their_turn_and_another_one_is_first():
    calls: list[str] = []
    steps = [lambda name=name: calls.append(name) for name in "abc"]
    seconds = speed.take_turns(steps, [1, 2, 1], repeats=4, device=CPU)
    assert "".join(calls) == "abbc" + "bbca" + "cabb" + "abbc"
    assert seconds.shape == (3, 4) and (seconds > 0).all()


def test_a_turn_s_seconds_are_of_one_call(monkeypatch):
    now = [0.0]

    def three_seconds() -> None:
        now[0] += 3

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    assert (speed.take_turns([three_seconds], [5], 2, CPU) == 3).all()
    assert speed.warm_up(three_seconds, 10, CPU) == 4


def test_quartiles():
    assert speed.quartiles(np.array([5, 1, 3, 2, 4])) == (2, 3, 4)


def test_peak_memory_is_of_what_is_held_at_once():
    """Two tensors of 4 MB at a time, though three are made."""

    def step() -> None:
        first = torch.zeros(1_000_000)
        second = first + 1
        del first
        second = second * 2

    assert speed.peak_memory(step, CPU) == pytest.approx(8e6, rel=0.01)


def test_the_matrix_product_has_the_multiply_accumulates_that_it_says():
    from evit.measure.steps import executed_macs

    step, macs = speed.matmul_step(torch.float32, CPU)
    assert executed_macs(step) == macs
