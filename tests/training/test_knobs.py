"""What a recipe says reaches the parts that train."""

import pytest
import torch
from timm.layers import DropPath

from evit.commands import train as training
from evit.training.callbacks import EMA, BestCheckpoint, KeepRateSchedule
from evit.training.module import make_optimizer
from tests.training.conftest import Killed

RECIPE = (
    "recipe.epochs=7 recipe.clip_grad=0.5 recipe.eval_every=3 recipe.ema_decay=0.75 "
    "recipe.ema_evaluated=true "
    "recipe.shrink_start_epoch=1 recipe.shrink_epochs=2 recipe.token_multiple=4 "
    "recipe.drop_path=0.3 recipe.mixup=0.6 recipe.cutmix=0.4 recipe.mixup_switch_prob=0.2 "
    "recipe.label_smoothing=0.05 recipe.lr=2e-3 recipe.lr_batch_size=8 recipe.weight_decay=0.07 "
    "recipe.warmup_epochs=0 recipe.max_train_images=8"
).split()


@pytest.fixture(scope="module")
def parts(train, tmp_path_factory):
    """The trainer, the module and the data of a run that is about to begin."""
    found = []

    def fit(trainer, module, data, checkpoint):
        found.extend([trainer, module, data])
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", fit)
        train(tmp_path_factory.mktemp("knobs"), *RECIPE)
    return found


def test_of_the_loop(parts):
    trainer = parts[0]
    assert trainer.max_epochs == 7 and trainer.check_val_every_n_epoch == 3
    assert trainer.gradient_clip_val == 0.5


def test_of_what_happens_beside_it(parts):
    (ema,) = (c for c in parts[0].callbacks if isinstance(c, EMA))
    average, weight = torch.zeros(1), torch.ones(1)
    ema._kwargs["multi_avg_fn"]([average], [weight], 1)
    assert average.item() == 0.25 and ema.evaluated
    (schedule,) = (c for c in parts[0].callbacks if isinstance(c, KeepRateSchedule))
    assert (schedule.schedule, schedule.multiple) == ((1, 2), 4)
    (best,) = (c for c in parts[0].callbacks if isinstance(c, BestCheckpoint))
    assert best.first_epoch == 3


def test_of_the_model_and_its_loss(parts):
    module = parts[1]
    rates = [p.drop_prob for p in module.model.modules() if isinstance(p, DropPath)]
    assert max(rates) == pytest.approx(0.3) and rates == sorted(rates)
    mixup = module.objective.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.switch_prob) == (0.6, 0.4, 0.2)
    assert mixup.label_smoothing == 0.05 and mixup.mix_prob == 1


def test_of_the_optimizer(parts):
    module = parts[1]
    optimizer, _ = make_optimizer(module.model, module.recipe, 100)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.07}
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3 * 4 / 8}


def test_of_the_images(parts):
    data = parts[2]
    assert data.recipe == parts[1].recipe and data.recipe.max_train_images == 8
