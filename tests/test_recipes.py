"""The recipes: what a run would do is what was published, and every row of the paper has one."""

import copy
import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import timm.scheduler
import torch
import yaml
from omegaconf import OmegaConf

from evit.commands import register
from evit.commands.plan import build_model, plan
from evit.config import Recipe
from evit.report import paper
from evit.training.losses import Classification
from evit.training.module import Classifier, lr_at, make_optimizer
from tests.conftest import ROOT
from tests.test_conf import CONF_DIR, EXPERIMENTS, composed

register()
TABLE = yaml.safe_load((ROOT / "tests/recipes.yaml").read_text())
OWN = ("fashion_mnist", "cifar10", "cifar10_gpu", "evit_deit_s_any_rate")
OF_THE_PAPER = [name for name in EXPERIMENTS if name not in OWN]
COMMAND = re.compile(r"^#   IMAGENET_DIR=DIR python src/train.py (.*)$", re.MULTILINE)
ROW = re.compile(r"^#   (.+?) +(\d\d\.\d) +(\d+)$", re.MULTILINE)
# Of a plan, what is not a recipe's.
OTHERS = {"data", "paper", "hours"}
AUGMENTATION = (
    "repeated_augmentations crop_scale flip rand_augment random_erasing mixup cutmix "
    "label_smoothing"
).split()


def planned(name: str, *overrides: str) -> dict[str, Any]:
    """The plan of a run, what its recipe says, its optimizer and its batches."""
    cfg = composed(f"experiment={name}", *overrides)
    found, recipe = plan(cfg), OmegaConf.to_object(cfg.recipe)
    optimizer, rates = optimized(cfg, recipe, found["data"]["num_classes"])
    backbone = {} if rates == found["schedule"]["lr"] else dict(backbone_lr=rates)
    loss, weights = found["loss"], {}
    if loss == "TokenLabels":
        weights = dict(token_label_weight=recipe.token_label_weight)
    if "DynamicViT" in str(cfg.model.get("reducer")):
        distilled = recipe.teacher or found["start"] == "pretrained"
        weights = dict(ratio_weight=recipe.ratio_weight)
        weights |= dict(distill_weight=recipe.distill_weight if distilled else 0.0)
    augmentation = {name: getattr(recipe, name) for name in AUGMENTATION}
    augmentation |= dict(mix_token=True) if loss == "TokenLabels" else {}
    if recipe.mixup or recipe.cutmix:
        augmentation |= {k: getattr(recipe, k) for k in ("mixup_switch_prob", "mixup_mode")}
    return found | dict(
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        drop_path=0.0 if recipe.train_in_eval_mode else recipe.drop_path,
        train_in_eval_mode=recipe.train_in_eval_mode,
        augmentation={name: value for name, value in augmentation.items() if value},
        ema=dict(decay=recipe.ema_decay, evaluated=recipe.ema_decay and recipe.ema_evaluated),
        loss=dict(name=loss) | weights,
        optimizer=optimizer | dict(clip_grad=recipe.clip_grad),
        schedule=found["schedule"] | backbone | dict(name=recipe.lr_schedule),
        batches=batches(cfg, recipe),
    )


def optimized(cfg: Any, recipe: Recipe, num_classes: int) -> tuple[dict[str, Any], list[float]]:
    """What the optimizer of a run is, and the learning rate of its last group in every epoch."""
    with torch.device("meta"):
        model = build_model(cfg, recipe, num_classes, pretrained=False)
    objective = Classification(model, recipe, num_classes, recipe.batch_size)
    Classifier(model, recipe, num_classes, objective)  # freezes what the recipe says
    optimizer, scheduler = make_optimizer(model, recipe, total_steps=recipe.epochs)
    groups = [
        dict(tensors=len(group["params"]), parameters=sum(p.numel() for p in group["params"]))
        | {name: group[name] for name in ("weight_decay", "lr_scale")}
        for group in optimizer.param_groups
    ]
    found = dict(name=type(optimizer).__name__, betas=list(optimizer.defaults["betas"]))
    rates = [scheduler.lr_lambdas[-1](epoch) for epoch in range(recipe.epochs)]
    return found | dict(eps=optimizer.defaults["eps"], groups=groups), rates


def batches(cfg: Any, recipe: Recipe) -> list[dict[str, int]]:
    found = []
    for processes in (1, 4, 8, 16):
        count = cfg.trainer.accumulate_grad_batches or recipe.accumulation(processes)
        share, left = divmod(recipe.batch_size, processes * count)
        if not left:
            found.append(dict(processes=processes, per_process=share, accumulation=count))
    return found


def differences(expected: Any, found: Any, path: str = "") -> list[str]:
    """Where a plan is not as expected; of a list of rates, the expected epochs count."""
    if isinstance(expected, dict) and isinstance(found, list):
        return [p for k, v in expected.items() for p in differences(v, found[k], f"{path}/{k}")]
    if isinstance(expected, dict):
        if expected.keys() != found.keys():
            return [f"{path}: {sorted(found)}, not {sorted(expected)}"]
        return [p for k, v in expected.items() for p in differences(v, found[k], f"{path}/{k}")]
    if isinstance(expected, list):
        if len(expected) != len(found):
            return [f"{path}: {found}, not {expected}"]
        pairs = zip(expected, found, strict=True)
        return [p for i, (v, f) in enumerate(pairs) for p in differences(v, f, f"{path}/{i}")]
    same = expected == found
    if isinstance(expected, float):
        same = found is not None and math.isclose(expected, found, rel_tol=1e-3)
    return [] if same else [f"{path}: {found}, not {expected}"]


def against_the_table(name: str, found: dict[str, Any]) -> list[str]:
    expected = {key: value for key, value in TABLE[name].items() if key != "overrides"}
    return differences(expected, {k: v for k, v in found.items() if k not in OTHERS})


@pytest.fixture(autouse=True, scope="module")
def no_random_weights():
    """The plans' models are on the meta device, where drawing takes long and gives nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor)
        yield


@pytest.fixture(scope="module")
def plans() -> dict[str, dict[str, Any]]:
    found = {}
    for name, expected in TABLE.items():
        found[name] = planned(name.split(",")[0], *expected["overrides"])
    return found


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_is_the_published_one(name, plans):
    assert not against_the_table(name, plans[name])


def test_every_experiment_of_the_paper_is_in_the_table():
    assert {name.split(",")[0] for name in TABLE} == set(OF_THE_PAPER)


def leaves(value: Any, path: tuple = ()) -> list[tuple]:
    if not isinstance(value, dict | list):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]


def test_a_change_of_any_one_value_is_a_difference(plans):
    expected = {k: v for k, v in TABLE["evit_deit_s"].items() if k != "overrides"}
    paths = leaves(expected)
    assert len(paths) > 50
    for *path, last in paths:
        found = copy.deepcopy(plans["evit_deit_s"])
        inner: Any = found
        for key in path:
            inner = inner[key]
        number = isinstance(inner[last], int | float)
        inner[last] = inner[last] * 1.01 + 1e-9 if number else f"not {inner[last]}"
        assert against_the_table("evit_deit_s", found), (path, last)


@pytest.mark.parametrize(
    "knob",
    ["lr_schedule=timm", "mixup=0.7", "ema_evaluated=true", "max_batch_per_process=512"],
)
def test_a_change_of_a_knob_is_a_difference(knob):
    assert against_the_table("evit_deit_s", planned("evit_deit_s", f"recipe.{knob}"))


def published_lr(recipe: Recipe) -> list[float]:
    """timm's scheduler, as the loop of DeiT (EViT's too) or of timm (LV-ViT's too) steps it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=recipe.peak_lr)
    scheduler = timm.scheduler.CosineLRScheduler(
        optimizer,
        t_initial=int(recipe.epochs - recipe.cooldown_epochs),
        lr_min=recipe.min_lr,
        warmup_t=int(recipe.warmup_epochs),
        warmup_lr_init=recipe.warmup_lr,
    )
    found = []
    for epoch in range(recipe.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + (recipe.lr_schedule == "timm"))
    return found


@pytest.mark.parametrize("name", [n for n in OF_THE_PAPER if n != "dynamicvit_deit_s"])
def test_the_learning_rate_of_every_epoch_is_timm_s(name):
    recipe: Any = OmegaConf.to_object(composed(f"experiment={name}").recipe)
    ours = [lr_at(epoch + 0.5, recipe) for epoch in range(recipe.epochs)]
    assert ours == pytest.approx(published_lr(recipe), rel=1e-12)


def test_the_learning_rate_of_every_step_of_dynamicvit_is_its_authors():
    """utils.py, cosine_scheduler: its warm-up ends at the peak, ours at the step after."""
    recipe: Any = OmegaConf.to_object(composed("experiment=dynamicvit_deit_s").recipe)
    steps, warmup = 1251 * 30, 1251 * 5
    decay = np.arange(steps - warmup) / (steps - warmup)
    published = np.concatenate(
        [np.linspace(0, 1e-3, warmup), 1e-6 + (1e-3 - 1e-6) * (1 + np.cos(np.pi * decay)) / 2]
    )
    ours = [lr_at(step / 1251, recipe) for step in range(steps)]
    np.testing.assert_allclose(ours, published, rtol=1.01 / warmup)


@functools.cache
def rows() -> list[dict[str, Any]]:
    """The plan of every row of the experiments' headers, with what the header says of it."""
    found = []
    for name in OF_THE_PAPER:
        header = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
        (command,) = COMMAND.findall(header)
        for words, top1, hours in ROW.findall(header):
            overrides = [] if words == "as it is" else words.split()
            said = dict(name=name, overrides=overrides, top1=float(top1), hours=hours)
            row = plan(composed(*command.split(), *overrides))
            found.append(dict(said=said, plan=row))
    return found


def test_every_row_of_the_paper_is_that_of_one_command():
    reached = [row for found in rows() for row in found["plan"]["paper"]]
    assert len(reached) == len(paper.training_runs()) == 39
    assert all(row in reached for row in paper.training_runs())


def test_the_commands_start_from_weights_where_they_fine_tune():
    starts = {row["said"]["name"]: row["plan"]["start"] for row in rows()}
    assert "missing" not in starts.values()
    assert [name for name in starts if starts[name] == "checkpoint"] == [
        "evit_lvvit_s_448",
        "lvvit_s_384",
    ]


def test_the_numbers_of_the_headers_are_those_of_the_paper_and_of_the_dry_run():
    for row in rows():
        said, found = row["said"], row["plan"]
        assert {r["top1"] for r in found["paper"]} == {said["top1"]}, said
        assert f"{found['hours']:.0f}" == said["hours"], said


@pytest.mark.parametrize(
    ("batch_size", "processes", "expected"),
    [(2048, 1, 8), (2048, 4, 2), (2048, 8, 1), (2048, 16, 1), (2304, 1, 9), (2560, 3, 1)],
)
def test_the_fewest_batches_that_fit_are_accumulated(batch_size, processes, expected):
    recipe = Recipe(epochs=1, batch_size=batch_size, lr=1.0, max_batch_per_process=256)
    assert recipe.accumulation(processes) == expected


def test_without_a_limit_nothing_is_accumulated():
    assert Recipe(epochs=1, batch_size=2048, lr=1.0).accumulation(1) == 1
