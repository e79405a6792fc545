"""How far training is, by a clock that only the loader and the training step move."""

import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from evit.data import order
from evit.training import progress
from evit.training.progress import Bar, Lines, Throughput


class Clock:
    """Loading a batch takes 3 s and training with it 1 s."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (order, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    return clock


class Loader(order.Resumable):
    def __init__(self, clock: Clock):
        self.clock = clock

    def __len__(self) -> int:
        return 4

    def batches(self, start):
        for _ in range(start, 4):
            self.clock.now += 3
            yield torch.ones(8, 1)


class Model(L.LightningModule):
    def __init__(self, clock: Clock):
        super().__init__()
        self.clock, self.weight = clock, torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, _):
        self.clock.now += 1
        loss = (batch * self.weight).mean()
        self.log_dict({"train/loss": loss, "keep_rate": 0.7, "tokens_per_image": 120.0})
        return loss

    def validation_step(self, batch, _):
        self.log("val/top1", 79.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(clock: Clock, *shown: L.Callback) -> Throughput:
    """Train for two epochs of 4 batches, of 8 images each."""
    throughput = Throughput(batch_size=8)
    for callback in shown:
        callback.throughput = throughput
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[throughput, *shown],
        enable_progress_bar=any(isinstance(callback, Bar) for callback in shown),
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Model(clock), Loader(clock), Loader(clock))
    return throughput


def test_the_wait_for_data_and_the_speed_are_measured(clock):
    throughput = fit(clock, Lines())
    assert throughput.images_per_s == pytest.approx(8 / 4)
    assert throughput.data_wait == pytest.approx(3 / 4)


def test_lines_are_plain_and_say_how_far_training_is(clock, capsys):
    fit(clock, Lines())
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\r" not in shown
    assert "epoch 2/2  train/loss" in shown and "val/top1 79.500" in shown
    # The first is due after 8 s, the next 30 s later: 12 s of an evaluation lie between.
    steps = [line for line in shown.splitlines() if " step " in line]
    assert len(steps) == 2
    assert re.fullmatch(
        r"epoch 1/2  step 2/4  loss [\d.]+  keep rate 0.70  120 tokens/image  2 images/s  "
        r"data wait 75 %  0:00:24 left",
        steps[0],
    )
    assert steps[1].startswith("epoch 2/2  step 3/4  loss")


def test_a_long_evaluation_says_how_far_it_is(clock, capsys):
    lines = Lines()
    trainer = SimpleNamespace(is_global_zero=True, num_val_batches=[50])
    for batch in range(50):
        clock.now += 5
        lines.on_validation_batch_end(trainer, None, None, None, batch)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["evaluating 2/50", "evaluating 8/50"] and len(shown) == 9


def test_the_bar_shows_the_state_and_evaluations_stay_as_lines(clock, capsys):
    seen = []

    class Seen(Bar):
        def get_metrics(self, trainer, module):
            seen.append(dict(super().get_metrics(trainer, module)))
            return seen[-1]

    fit(clock, Seen(), Lines(steps=False))
    assert seen[-1]["speed"] == "2 images/s" and seen[-1]["train/loss"].startswith("loss")
    shown = capsys.readouterr().out
    assert shown.count("val/top1 79.500") == 2 and " step " not in shown
