"""Every number that training logs, against what it is said to be."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.nn.functional import cross_entropy

import evit
from evit.config import Recipe
from evit.data.order import EpochLoader, Shard
from evit.training.callbacks import KeepRateSchedule, Progress
from evit.training.losses import make_objective
from evit.training.module import Classifier, lr_at

STEPS = 4  # of an epoch
SHAPE = dict(embed_dim=24, depth=4, num_heads=2, num_classes=9)
RECIPE = Recipe(
    epochs=3, batch_size=8, lr=1e-3, lr_batch_size=4, warmup_epochs=1, shrink_epochs=2, eval_every=2
)


class Batches(EpochLoader):
    def __init__(self, steps: int):
        super().__init__(8 * steps, RECIPE, Shard(0, 1, 8, 0), train=True, img_size=16)
        draw = torch.Generator().manual_seed(steps)
        self.images = torch.randn(steps, 8, 3, 16, 16, generator=draw)
        self.labels = torch.randint(0, 9, (steps, 8), generator=draw)

    def batches(self, start: int):
        yield from zip(self.images[start:], self.labels[start:], strict=True)


class Recorder(DummyLogger):
    """The numbers logged: by name, those of each step."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics, step):
        for name, value in metrics.items():
            self.found.setdefault(name, {})[step] = value


def train(folder, keep_rate):
    """Numbers logged in three epochs; the model, the losses of its batches and their rates."""
    torch.manual_seed(0)
    model = evit.EViT(16, 4, keep_rate=keep_rate, **SHAPE)
    objective, recorder = make_objective(model, RECIPE, 9, 8), Recorder()
    seen = []

    def charge(*batch):
        losses = objective(*batch)
        seen.append((losses["loss"].item(), model.keep_rate, model.tokens_per_block()))
        return losses

    charge.teacher = None
    module = Classifier(model, RECIPE, 9, charge)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        check_val_every_n_epoch=RECIPE.eval_every,
        log_every_n_steps=1,
        logger=recorder,
        callbacks=[Progress(8), KeepRateSchedule(0, 2)],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, Batches(STEPS), Batches(2))
    return recorder.found, model, seen


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), 0.5)


def test_each_step_has_its_loss_its_learning_rate_and_its_tokens(run):
    logged, _, seen = run
    losses, rates, tokens = zip(*seen, strict=True)
    assert list(logged["train/loss"].values()) == pytest.approx(losses)
    assert list(logged["keep_rate"].values()) == pytest.approx([rate[0] for rate in rates])
    exact = evit.EViT(16, 4, keep_rate=0.5, **SHAPE)
    for rate, each in zip(rates, tokens, strict=True):
        exact.set_keep_rate(rate)
        assert each == exact.tokens_per_block()
    means = [sum(each) / len(each) for each in tokens]
    assert list(logged["tokens_per_image"].values()) == pytest.approx(means)
    expected = [lr_at(step / STEPS, RECIPE) for step in range(3 * STEPS)]
    assert list(logged["lr"].values()) == pytest.approx(expected)
    for name in ("train/loss", "keep_rate", "tokens_per_image", "lr"):
        assert list(logged[name]) == list(range(3 * STEPS)), name


def test_the_keep_rate_is_final_from_the_epoch_that_the_recipe_says(run):
    rates = list(run[0]["keep_rate"].values())
    assert rates[0] == 1 and all(a > b for a, b in zip(rates, rates[1 : 2 * STEPS], strict=False))
    assert rates[RECIPE.full_rate_epoch * STEPS :] == [0.5] * STEPS
    assert rates[RECIPE.full_rate_epoch * STEPS - 1] > 0.5


def test_reorganizations_of_different_rates_have_one_number_each(tmp_path):
    logged, _, seen = train(tmp_path, [0.9, 0.7, 0.5])
    for i in range(3):
        rates = [rates[i] for _, rates, _ in seen]
        assert list(logged[f"keep_rate/{i + 1}"].values()) == pytest.approx(rates)
    assert "keep_rate" not in logged


def test_evaluations_have_loss_and_percent_of_the_model_after_every_so_many_epochs(run):
    logged, model, _ = run
    data = Batches(2)
    images, labels = data.images.flatten(0, 1), data.labels.flatten()
    with torch.no_grad():
        logits = model.eval()(images)
    ranked = logits.topk(5).indices == labels[:, None]
    expected = {
        "val/loss": cross_entropy(logits, labels).item(),
        "val/top1": 100 * ranked[:, 0].float().mean().item(),
        "val/top5": 100 * ranked.any(1).float().mean().item(),
    }
    assert expected["val/top1"] < expected["val/top5"] < 100
    for name, value in expected.items():
        assert list(logged[name]) == [2 * STEPS - 1, 3 * STEPS - 1]  # the last epoch is evaluated
        assert logged[name][3 * STEPS - 1] == pytest.approx(value)
    assert set(logged["train/images_per_s"]) == set(logged["train/data_wait"])
    assert all(speed > 0 for speed in logged["train/images_per_s"].values())
    assert all(0 <= wait <= 1 for wait in logged["train/data_wait"].values())
