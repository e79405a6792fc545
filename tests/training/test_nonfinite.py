"""Numbers that are not finite: named at their step, never saved, never part of a result."""

import itertools
import math
import re
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

import evit
from evit.commands import train as training
from evit.config import Recipe
from evit.tracking import Tracker
from evit.training.losses import Classification, make_objective
from evit.training.module import Classifier
from tests.training.conftest import only, training_state

RARELY = "trainer.log_every_n_steps=50"
STEP = r"epoch 2/3, step 5, learning rate \S+, keep rate 0\.\d+/0\.\d+/0\.\d+"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture
def failing(train, tmp_path, cache, capfd, monkeypatch):
    """Train in tmp_path until it fails; what that says. No run that failed has succeeded in W&B."""
    tracked = Mock()  # W&B's run
    tracker = Tracker(lambda: tracked, "id")
    monkeypatch.setattr(training, "wandb_logger", lambda *_, **__: tracker)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit:
            train(tmp_path, cache, *arguments)
        assert exit.value.code == 2
        tracked.finish.assert_called_once_with(1)
        assert not list(tmp_path.glob("outputs/*/*/result.json"))
        shown = capfd.readouterr().err
        assert "Traceback" not in shown and shown.count("error:") == 1
        return shown

    return run


@pytest.fixture
def not_a_number(monkeypatch):
    """Have an image of a batch be not a number: the batch of this number in the run."""

    def at(*numbers: int) -> None:
        calls, original = itertools.count(), Classification.__call__

        def call(self, images, *more):
            if next(calls) in numbers:
                images[1] = math.nan
            return original(self, images, *more)

        monkeypatch.setattr(Classification, "__call__", call)

    return at


def values(state):
    """All tensors of nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            yield from values(part)


def all_finite(folder) -> bool:
    """Whether weights, averages and optimizer are, in the last checkpoint; True without one."""
    if not list(folder.glob("outputs/*/*/checkpoints/*")):
        return True
    return all(tensor.isfinite().all() for tensor in values(training_state(folder)))


def test_a_learning_rate_at_which_training_diverges_ends_it(failing, tmp_path):
    said = failing("recipe.lr=1e20", "recipe.warmup_epochs=0", "checkpoint_every_n_steps=1")
    assert re.search(r"the loss is \S+ \(epoch 1/3, step [23], learning rate \d\S+e\+1\d, ", said)
    assert all_finite(tmp_path)


def test_it_is_named_though_it_is_looked_at_later(failing, not_a_number, tmp_path):
    not_a_number(6 + 3)  # the second batch of the second step of the second epoch
    said = failing(RARELY, "checkpoint_every_n_steps=null")
    found = re.search(rf"the loss is nan \({STEP}\), for images of process 0: (.*)\. No che", said)
    numbers = re.match(r"(\d+), (\d+) of \S+train\.beton$", found[1])
    assert all(int(number) < 12 for number in numbers.groups())
    assert training_state(tmp_path)["step"] == 3 and all_finite(tmp_path)


def test_no_checkpoint_is_written_of_it(failing, not_a_number, tmp_path):
    not_a_number(2)  # of the second step, after which one is due
    failing(RARELY)
    assert not list(tmp_path.glob("outputs/*/*/checkpoints/*"))


@pytest.mark.parametrize(
    ("step", "message"),
    [(2, r"after 2 steps model\.head\.bias is not finite"), (3, "val/loss is nan after epoch 1/3")],
)
def test_weights_that_are_not_finite_are_not_saved(step, message, failing, tmp_path):
    steps = itertools.count(1)

    def spoil(optimizer, *_):
        if next(steps) == step:
            optimizer.param_groups[0]["params"][-1].data[0] = math.inf

    hook = register_optimizer_step_post_hook(spoil)
    try:
        said = failing()
    finally:
        hook.remove()
    assert re.search(message, said)
    saved = list(tmp_path.glob("outputs/*/*/checkpoints/*"))
    assert len(saved) == step - 2  # one is due after the second step
    assert all_finite(tmp_path)


def test_a_run_that_has_ended_goes_on_as_is_advised(failing, train, not_a_number, tmp_path, cache):
    not_a_number(9)
    failing()
    last = only(tmp_path, "checkpoints/last.ckpt")
    shown = train(tmp_path / "other", cache, f"resume={last}", "recipe.clip_grad=1")
    assert "top-1" in shown and all_finite(tmp_path / "other")


def test_weights_that_are_not_finite_from_the_start_are_noticed_at_the_first_step(
    failing, tmp_path
):
    model = evit.EViT(img_size=28, patch_size=7, embed_dim=96, depth=12, num_heads=3, num_classes=2)
    model.head.bias.data[0] = -math.inf
    torch.save(model.state_dict(), tmp_path / "bad.pth")
    said = failing(f"checkpoint={tmp_path}/bad.pth", "trainer.precision=bf16-mixed")
    assert "the loss is inf (epoch 1/3, step 1," in said


@pytest.mark.parametrize("number", [None, 3], ids=["gradients overflow", "loss is not a number"])
def test_in_float16_overflowing_gradients_are_left_to_the_scaler(number, tmp_path):
    """It lowers its scale until they do not; a loss is an error all the same."""
    recipe = Recipe(epochs=1, batch_size=2, lr=1e-3, clip_grad=1.0)
    model = evit.EViT(img_size=8, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=9)
    module = Classifier(model, recipe, 9, make_objective(model, recipe, 9, 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # too much
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=recipe.clip_grad,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    images = torch.randn(6, 2, 3, 8, 8)
    if number is not None:
        images[number] = math.nan
    data = L.LightningDataModule()
    data.describe_batch = lambda epoch, batch: f"batch {batch}"
    data.train_dataloader = lambda: DataLoader([(x, torch.arange(2)) for x in images], None)
    if number is None:
        trainer.fit(module, data)
        assert scaler.get_scale() < 2.0**127
        return
    with pytest.raises(FloatingPointError, match="loss is nan .*step 4, .* batch 3"):
        trainer.fit(module, data)
