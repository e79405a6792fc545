"""Time and memory of steps: what takes turns, and what is counted."""

import pytest
import timm
import torch

from evit.measure import speed

CPU = torch.device("cpu")


def model(**kwargs) -> torch.nn.Module:
    return timm.create_model("evit_deit_tiny_patch16", img_size=32, depth=4, **kwargs)


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


def test_on_a_cpu_the_compiler_is_not_imported_to_time_a_step(monkeypatch):
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", None)  # it would be
    assert speed.timed(lambda: None, 1, CPU) > 0


def test_peak_memory_is_of_what_is_held_at_once():
    """Two tensors of 4 MB at a time, though three are made."""

    def step() -> None:
        first = torch.zeros(1_000_000)
        second = first + 1
        del first
        second = second * 2

    assert speed.peak_memory(step, CPU) == pytest.approx(8e6, rel=0.01)


def test_a_forward_pass_is_without_gradients():
    images, seen = torch.randn(1, 3, 32, 32), []
    evit = model().eval()
    evit.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    speed.make_step(evit, evit, images, None)()
    assert seen == [False]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_training_step_changes_every_weight(dtype):
    evit = model(drop_loc=[1]).train()
    before = {name: weight.clone() for name, weight in evit.named_parameters()}
    speed.make_step(evit, evit, torch.randn(2, 3, 32, 32), dtype)()
    same = [name for name, weight in evit.named_parameters() if torch.equal(weight, before[name])]
    assert same == []


def test_the_precision_of_float32_products_is_set():
    speed.set_precision("tf32")
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    speed.set_precision("bf16")
    assert torch.get_float32_matmul_precision() == "highest"
