"""src/train.py with the paper's other systems."""

import json

import pytest

from tests.conftest import command

TINY = ["+model.embed_dim=48", "+model.depth=4", "+model.num_heads=3", "img_size=32"]
SMALL = [
    "recipe.epochs=1",
    "recipe.batch_size=4",
    "recipe.warmup_epochs=0",
    "recipe.cooldown_epochs=0",
    "recipe.backbone_frozen_epochs=0",
    "recipe.shrink_start_epoch=0",
    "recipe.shrink_epochs=0",
    "logger=none",
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
]


def trained(folder, *overrides: str) -> tuple[str, dict, dict]:
    """What was printed, the metrics that were logged and the result."""
    done = command("train.py", *overrides, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("outputs/*/*/result.json")
    logged: dict = {}
    for line in (path.parent / "metrics.jsonl").read_text().splitlines():
        logged |= json.loads(line)
    return done.stdout, logged, json.loads(path.read_text())


def test_dynamicvit_on_lv_vit_without_a_teacher_says_so(tmp_path, shared_photos):
    root = f"data.root={shared_photos}"
    printed, logged, _ = trained(tmp_path, *TINY, *SMALL, root, "model=dynamicvit_lvvit")
    assert "Without a teacher of these classes there is no distillation" in printed
    assert logged["train/ratio_loss"] >= 0 and "train/class_distillation" not in logged


def test_lv_vit_is_dense_and_says_what_it_leaves_out(tmp_path, shared_photos):
    root = f"data.root={shared_photos}"
    printed, _, result = trained(
        tmp_path, *TINY, *SMALL, root, "model=lvvit", "recipe=lvvit", "keep_rate=0.5"
    )
    assert "Without effect here (model=lvvit): keep_rate." in printed
    assert "Without label maps LV-ViT is a plain classifier" in printed
    assert result["model"]["keep_rate"] == [1.0] * 3


def test_label_maps_of_a_model_that_learns_from_none_are_not_looked_for(tmp_path, shared_photos):
    words = ["data.label_maps=nowhere", "model=evit_deit_micro", *SMALL]
    printed, _, _ = trained(tmp_path, *words, "img_size=28", f"data.root={shared_photos}")
    assert "Without effect here (model=evit_deit_micro): data.label_maps." in printed


def test_knobs_of_parts_that_are_off_are_named(tmp_path, shared_photos):
    idle = ["ratio_weight=1", "distill_weight=1", "token_label_weight=2", "mixup_mode=pair"]
    idle = [f"recipe.{knob}" for knob in [*idle, "mixup_switch_prob=0.1", "ema_evaluated=true"]]
    off = ["recipe.mixup=0", "recipe.cutmix=0", "recipe.ema_decay=null"]
    words = [*SMALL, *idle, *off, "model=evit_deit_micro", "img_size=28"]
    printed, _, _ = trained(tmp_path, *words, f"data.root={shared_photos}")
    names = ", ".join(knob.partition("=")[0] for knob in idle)
    assert f"Without effect here (model=evit_deit_micro): {names}." in printed


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lvvit", "dynamicvit_deit", "dynamicvit_lvvit", "deit"])
def test_every_system_trains_at_full_size_on_the_embedded_data(tmp_path, model):
    few = ["recipe.max_train_images=64", "recipe.max_val_images=32", "recipe.batch_size=16"]
    _, _, result = trained(tmp_path, f"model={model}", *few)
    assert result["model"]["img_size"] == 224 and result["model"]["params"] > 20e6
