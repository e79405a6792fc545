"""How far training is, by a clock that only the loader and the training step move."""

import io
import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rich.console import Console

from evit.data import resumable
from evit.training import progress
from evit.training.progress import Display, Lines, Throughput, duration


class Clock:
    """Loading a batch takes 3 s and training with it 1 s."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (resumable, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    return clock


class Loader(resumable.Resumable):
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


def fit(clock: Clock, kind: type) -> tuple[Throughput, progress.Progress]:
    throughput = Throughput(batch_size=8)
    shown = kind(throughput)
    shown.interval = 0.0
    if isinstance(shown, Display):
        shown.console = Console(file=io.StringIO(), force_terminal=True, width=80)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[throughput, shown],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Model(clock), Loader(clock), Loader(clock))
    return throughput, shown


def test_the_wait_for_data_and_the_speed_are_measured(clock):
    throughput, _ = fit(clock, Lines)
    assert throughput.images_per_s == pytest.approx(8 / 4)
    assert throughput.data_wait == pytest.approx(3 / 4)


def test_lines_are_plain_and_say_how_far_training_is(clock, capsys):
    fit(clock, Lines)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\r" not in shown
    assert "epoch 2/2  train/loss" in shown and "val/top1 79.500" in shown
    assert re.search(
        r"^epoch 1/2  step 3/4  loss [\d.]+  keep rate 0.70  120 tokens/image  2 images/s  "
        r"data wait 75 %  ETA 20 s$",
        shown,
        re.MULTILINE,
    )  # 5 steps of 4 s are left


def test_the_display_fits_into_80_columns_and_leaves_the_evaluations(clock):
    _, shown = fit(clock, Display)
    written = shown.console.file.getvalue()
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)
    lines = [line.strip() for part in text.split("\n") for line in part.split("\r")]
    assert all(len(line) <= 80 for line in lines)
    # 2 steps are left, and 5 took 32 s, with an evaluation among them.
    assert any(re.match(r"epoch 2/2 .* 2/4  2 images/s .* ETA 13 s$", line) for line in lines)
    assert any(line.endswith("evaluating") for line in lines)
    assert any(line.startswith("loss") and "top-1 79.50 %" in line for line in lines)
    assert sum("val/top1 79.500" in line for line in lines) == 2
    assert shown.live is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (3599, "59 min 59 s"),
        (7500, "2 h 5 min"),
        (97300, "1 d 3 h"),
    ],
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text
