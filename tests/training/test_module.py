"""The LightningModule's parts."""

import lightning as L
import pytest
import timm
import torch
from torch.utils.data import DataLoader

import evit
from evit.config import Recipe
from evit.training.losses import make_objective
from evit.training.module import Classifier, lr_at, make_optimizer, mix_seed

RECIPE = Recipe(epochs=10, batch_size=1024, lr=5e-4, lr_batch_size=512, warmup_epochs=2)


def test_learning_rate_is_linear_in_the_batch_size():
    assert RECIPE.peak_lr == pytest.approx(1e-3)
    assert Recipe(epochs=1, batch_size=64, lr=1e-3).peak_lr == 1e-3


def test_learning_rate_warms_up_then_follows_a_cosine_to_its_minimum():
    at = [lr_at(step / 100, RECIPE) for step in range(1001)]
    assert at[0] == RECIPE.warmup_lr
    assert at[100] == pytest.approx((RECIPE.warmup_lr + 1e-3) / 2)
    assert at[200] == max(at) == pytest.approx(1e-3)
    assert at[600] == pytest.approx((1e-3 + RECIPE.min_lr) / 2)
    assert at[1000] == pytest.approx(RECIPE.min_lr)


def test_no_decay_on_one_dimensional_parameters_position_and_class_token():
    optimizer, _ = make_optimizer(timm.create_model("evit_deit_small_patch16"), RECIPE, 100)
    without, with_decay = optimizer.param_groups
    count = {g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in (without, with_decay)}
    assert count == {0.0: 138_088, 0.05: 21_912_576}  # DeiT-S's, as published
    assert [len(without["params"]), len(with_decay["params"])] == [102, 50]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(epochs=0), "recipe.epochs must be from 1 to inf, got 0"),
        (dict(batch_size=0), "recipe.batch_size must be from 1 to inf, got 0"),
        (dict(lr=-1.0), "recipe.lr must be from 0 to inf, got -1.0"),
        (dict(lr=float("nan")), "recipe.lr must be from 0 to inf, got nan"),
        (dict(warmup_epochs=10), "recipe.warmup_epochs': 10, .* leave nothing"),
        (dict(warmup_epochs=5, cooldown_epochs=5), "recipe.cooldown_epochs': 5} leave nothing"),
        (dict(drop_path=-1), "recipe.drop_path must be from 0 to 1, got -1"),
        (dict(crop_pct=0), "recipe.crop_pct must be from 0.01 to 1, got 0"),
        (dict(crop_scale=[1.0, 0.5]), r"recipe.crop_scale must be .* got \[1.0, 0.5\]"),
        (dict(random_erasing=1.5), "recipe.random_erasing must be from 0 to 1, got 1.5"),
        (dict(repeated_augmentations=0), "recipe.repeated_augmentations must be from 1 to inf"),
        (dict(mixup_mode="half"), "recipe.mixup_mode must be batch, pair, elem, got 'half'"),
        (dict(ema_decay=3), "recipe.ema_decay must be from 0 to 1, got 3"),
        (dict(max_train_images=0), "recipe.max_train_images must be from 1 to inf, got 0"),
        (
            dict(shrink_start_epoch=5, shrink_epochs=5),
            "shrink_epochs': 5} leave nothing of recipe.epochs=10",
        ),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_named(knobs, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**dict(epochs=10, batch_size=8, lr=1e-3) | knobs)


@pytest.mark.parametrize("in_eval_mode", [False, True])
def test_training_in_eval_mode_is_a_choice_that_outlasts_evaluations(in_eval_mode, tmp_path):
    recipe = Recipe(epochs=2, batch_size=4, lr=1e-3, train_in_eval_mode=in_eval_mode)
    model = evit.EViT(img_size=8, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=9)
    modes = []
    model.register_forward_pre_hook(lambda *_: modes.append(model.training))
    module = Classifier(model, recipe, 9, make_objective(model, recipe, 9, 4))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    batches = DataLoader([(torch.randn(4, 3, 8, 8), torch.arange(4))], batch_size=None)
    trainer.fit(module, batches, batches)
    trained, evaluated = modes[::2], modes[1::2]
    assert trained == [not in_eval_mode] * 2 and evaluated == [False] * 2


def test_seeds_of_neighbouring_runs_epochs_and_processes_differ():
    seeds = [mix_seed(s, e, r) for s in range(5) for e in range(5) for r in range(5)]
    assert len(set(seeds)) == 125


def test_validation_counts_every_image_once_whatever_the_batches():
    torch.manual_seed(0)
    model = evit.EViT(img_size=8, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=9)
    images, labels = torch.randn(10, 3, 8, 8), torch.arange(10) % 9
    found = []
    for sizes in ([10], [7, 3], [4, 4, 2]):
        module = Classifier(model, RECIPE, 9, make_objective(model, RECIPE, 9, 4)).eval()
        logged: dict[str, float] = {}
        module.log = lambda name, value, logged=logged, **_: logged.update({name: float(value)})
        with torch.no_grad():
            for i, batch in enumerate(zip(images.split(sizes), labels.split(sizes), strict=True)):
                module.validation_step(batch, i)
            module.on_validation_epoch_end()
        found.append(logged)
    assert found[0]["val/top1"] == pytest.approx(
        100 * (model.eval()(images).argmax(1) == labels).float().mean().item()
    )
    for other in found[1:]:
        assert other == pytest.approx(found[0])


def test_an_evaluation_in_which_one_loss_is_not_a_number_is_an_error():
    model = evit.EViT(img_size=8, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=9)
    module = Classifier(model, RECIPE, 9, make_objective(model, RECIPE, 9, 4)).eval()
    module.log = lambda *_, **__: None
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for number in 0.0, float("nan"):
        module.validation_step((torch.full((4, 3, 8, 8), number), torch.arange(4)), 0)
    with pytest.raises(FloatingPointError, match="val/loss is nan after epoch 1/10"):
        module.on_validation_epoch_end()


def test_erasing_is_a_function_of_seed_epoch_batch_and_process():
    recipe = Recipe(epochs=10, batch_size=4, lr=1e-3, random_erasing=1.0)
    model = evit.EViT(img_size=8, patch_size=4, embed_dim=24, depth=4, num_heads=2, num_classes=9)
    seen = []

    def objective(images, labels):
        seen.append(images)
        return dict(loss=images.sum())

    def step(seed, batch_idx):
        module = Classifier(model, recipe, 9, objective, seed)
        module.log = lambda *_, **__: None
        module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        module.training_step((torch.zeros(4, 3, 8, 8), torch.arange(4)), batch_idx)
        return seen[-1]

    torch.manual_seed(3)
    first = step(0, 0)
    assert all((image != 0).any() and (image == 0).any() for image in first)
    assert torch.equal(first, step(0, 0))
    assert not torch.equal(first, step(0, 1)) and not torch.equal(first, step(1, 0))
