"""One checkpoint for many keep rates; and distillation for any reducer."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from evit.config import Recipe
from evit.reducers import REDUCERS
from evit.training.callbacks import KeepRateSchedule
from evit.training.losses import dense_teacher, make_objective
from evit.training.module import Classifier
from tests.reducers.tiny import images, reduced

RATES = [1, 0.8, 0.6]
STATIC = sorted(name for name in REDUCERS if name not in ("dynamicvit", "random"))


def recipe(**more):
    return Recipe(epochs=2, batch_size=2, lr=1.0, **more)


def kl(student, teacher):
    student, teacher = student.log_softmax(1), teacher.log_softmax(1)
    return (teacher.exp() * (teacher - student)).sum(1).mean()


@pytest.mark.parametrize("name", STATIC)
def test_a_step_is_the_largest_rate_by_labels_and_another_by_its_predictions(name):
    model, x, labels = reduced(name, keep_rate=0.7), images(2), torch.tensor([1, 3])
    objective = make_objective(model, recipe(any_rate=RATES), 7, 2)
    model.set_keep_rate(0.6)
    losses = objective(x, labels)
    assert set(model.keep_rate) == {0.6}
    model.set_keep_rate(1.0)
    dense = model(x)
    model.set_keep_rate(0.6)
    consistency = kl(model(x), dense.detach())
    torch.testing.assert_close(losses["consistency"], consistency)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(dense, labels) + consistency)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def drawn(seed, steps, start=0):
    """The rates of some steps, as the callback sets them."""
    model = reduced("evit", keep_rate=0.7)
    logged = []
    module = SimpleNamespace(model=model, seed=seed, log_dict=None)
    module.recipe = recipe(any_rate=RATES)
    module.log = lambda name, value, **_: logged.append(value) if name == "keep_rate" else None
    callback, found = KeepRateSchedule(0, 0), []
    callback.setup(None, module, "fit")
    trainer = SimpleNamespace(num_training_batches=100, accumulate_grad_batches=1, current_epoch=0)
    for step in range(start, steps):
        trainer.global_step = step
        callback.on_train_batch_start(trainer, module, None, step)
        (rate,) = set(model.keep_rate)
        found.append(rate)
    assert logged == found
    callback.on_validation_start()
    assert model.keep_rate == (0.7,) * 3
    return found


def test_rates_depend_on_seed_and_step_alone_and_all_are_drawn():
    rates = drawn(0, 40)
    assert rates[25:] == drawn(0, 40, start=25) and rates != drawn(1, 40)
    assert set(rates) == {0.6, 0.8} and rates[::2] == [0.6] * 20


@pytest.mark.parametrize("name", ["evit", "tome"])
def test_class_logits_and_surviving_tokens_follow_a_dense_teacher(name):
    model, x, labels = reduced(name, keep_rate=0.7), images(2), torch.tensor([1, 3])
    other = dense_teacher(model)
    with torch.no_grad():
        other.head.weight.mul_(2)
        other.norm.weight.mul_(3)
        wanted, dense = other(x), other.forward_features(x)[:, 1:]
    objective = make_objective(model, recipe(distill_weight=0.3), 7, 2, teacher=other)
    Classifier(model, objective.recipe, 7, objective).on_train_start()  # moves it to the device
    losses = objective(x, labels)
    logits = model(x)
    assert model.keep_rate[0] == 0.7
    torch.testing.assert_close(losses["class_distillation"], kl(logits, wanted))
    own, (*_, kept) = model.forward_features(x), model(x, return_kept=True)[1]
    image = torch.arange(2)[:, None]
    squares = (own[:, 1:][:, : kept.shape[1]] - dense[image, kept.clamp(0)]).square().mean(2)
    tokens = squares[kept >= 0].mean()
    torch.testing.assert_close(losses["token_distillation"], tokens)
    expected = F.cross_entropy(logits, labels) + 0.3 * (kl(logits, wanted) + tokens)
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dynamicvit", {}, "recipe.any_rate is for a reducer of keep rates"),
        ("tome", dict(r=2), "recipe.any_rate is for a reducer of keep rates"),
        ("evit", dict(teacher="any"), "recipe.any_rate .* has its own teacher"),
        ("evit", dict(label_maps=True), "need data.label_maps=null"),
    ],
)
def test_what_cannot_be_trained_at_any_rate_is_said(name, options, message):
    options = dict(options)
    r = options.pop("r", None)
    model = reduced(name, **(dict(r=r, keep_rate=None, at=None) if r else dict(keep_rate=0.7)))
    with pytest.raises(ValueError, match=message):
        make_objective(model, recipe(any_rate=RATES), 7, 2, **options)


@pytest.mark.parametrize("rates", [[], [0.5], [0, 1], [0.5, 1.2]])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(ValueError, match="recipe.any_rate must be two keep rates or more"):
        recipe(any_rate=rates)
