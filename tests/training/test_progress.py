"""How far training is, by a clock that only the loader and the training step move."""

import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from evit.data import order
from evit.training import callbacks
from evit.training.callbacks import Progress
from tests.data.build import recipe_of


class Clock:
    """Loading a batch takes 3 s and training with it 1 s."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (order, callbacks):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    return clock


class Loader(order.EpochLoader):
    def __init__(self, clock: Clock):
        super().__init__(32, recipe_of(), order.Shard(batch_size=8), True, 1)
        self.clock = clock

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


def fit(clock: Clock, **options: bool) -> Progress:
    """Two epochs of four batches of 8 images."""
    progress = Progress(batch_size=8, **options)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[progress],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Model(clock), Loader(clock), Loader(clock))
    return progress


def test_lines_are_plain_and_say_how_far_and_how_fast_training_is(clock, capsys):
    progress = fit(clock)
    assert progress.images_per_s == pytest.approx(8 / 4)
    assert progress.data_wait == pytest.approx(3 / 4)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\r" not in shown
    assert "epoch 2/2  train/loss" in shown and "val/top1 79.500" in shown
    # The first is due after 8 s, the next 30 s later: 12 s of an evaluation lie between.
    steps = [line for line in shown.splitlines() if " step " in line]
    assert len(steps) == 2
    assert re.fullmatch(
        r"epoch 1/2  step 2/4  train/loss [\d.]+  keep_rate 0.700  tokens_per_image 120.000  "
        r"2 images/s  data wait 75%  0:00:24 left",
        steps[0],
    )
    assert steps[1].startswith("epoch 2/2  step 3/4  train/loss")


def test_a_long_evaluation_says_how_far_it_is(clock, capsys):
    progress = Progress(batch_size=8)
    trainer = SimpleNamespace(is_global_zero=True, num_val_batches=[50], callback_metrics={})
    trainer.current_epoch, trainer.max_epochs = 2, 2  # the last is over
    for batch in range(50):
        clock.now += 5
        progress.on_validation_batch_end(trainer, None, None, None, batch)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["epoch 2/2  evaluating 2/50", "epoch 2/2  evaluating 8/50"]
    assert len(shown) == 9


def test_beside_a_bar_evaluations_stay_as_lines(clock, capsys):
    fit(clock, bar=True)
    shown = capsys.readouterr().out
    assert shown.count("val/top1 79.500") == 2 and " step " not in shown
