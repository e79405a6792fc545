"""src/train.py with the paper's other systems."""

import json

import pytest
import torch

from tests.conftest import QUICK, command

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


def test_dynamicvit_learns_from_the_dense_model_that_it_starts_from(tmp_path, shared_photos):
    dense, student = tmp_path / "dense", tmp_path / "student"
    dense.mkdir()
    student.mkdir()
    root = f"data.root={shared_photos}"
    trained(dense, *TINY, *SMALL, root, "model=deit")
    (checkpoint,) = dense.glob("outputs/*/*/checkpoints/best.ckpt")
    printed, logged, result = trained(
        student,
        *(*TINY, *SMALL, root, "model=dynamicvit_deit", "recipe=dynamicvit"),
        f"checkpoint={checkpoint}",
    )
    assert "fusion is not used" in printed and "distillation" not in printed
    assert logged["train/class_distillation"] > 0 and logged["train/token_distillation"] > 0
    assert result["model"]["fusion"] is False
    assert result["model"]["macs_executed"] < result["model"]["macs"]


def test_dynamicvit_on_lv_vit_without_a_teacher_says_so(tmp_path, shared_photos):
    root = f"data.root={shared_photos}"
    printed, logged, _ = trained(tmp_path, *TINY, *SMALL, root, "model=dynamicvit_lvvit")
    assert "Without a teacher there is no distillation" in printed
    assert logged["train/ratio_loss"] >= 0 and "train/class_distillation" not in logged


def test_lv_vit_is_dense_and_says_what_it_leaves_out(tmp_path, shared_photos):
    root = f"data.root={shared_photos}"
    printed, _, result = trained(tmp_path, *TINY, *SMALL, root, "model=lvvit", "recipe=lvvit")
    assert "lvvit keeps every token: keep_rate and fusion are not used" in printed
    assert "Without label maps LV-ViT is a plain classifier" in printed
    assert result["model"]["keep_rate"] == [1.0] * 3


def test_token_labels_are_streamed_and_learnt_from(tmp_path, photos):
    labels, cells = tmp_path / "labels", torch.randn(2, 5, 3, 3)
    cells[1] = torch.arange(2).repeat(3)[:5, None, None]
    for image in photos.glob("train/*/*.jpg"):
        path = labels / image.relative_to(photos / "train").with_suffix(".pt")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(cells.half(), path)
    printed, logged, _ = trained(
        tmp_path,
        *(*TINY, *SMALL, f"data.root={photos}", "model=evit_lvvit", "recipe=lvvit"),
        f"data.label_maps={labels}",
    )
    assert "plain classifier" not in printed
    assert logged["train/token_loss"] > 0 and logged["train/class_loss"] > 0


def test_a_teacher_for_another_kind_of_model_is_refused(tmp_path, shared_photos):
    done = command(
        "train.py", *QUICK, f"data.root={shared_photos}", "recipe.teacher=a.ckpt", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "recipe.teacher=a.ckpt is for DynamicViT: EViT has no distillation" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", ["lvvit", "dynamicvit_deit", "dynamicvit_lvvit", "deit"])
def test_every_system_trains_at_full_size_on_the_embedded_data(tmp_path, model):
    few = ["recipe.max_train_images=64", "recipe.max_val_images=32", "recipe.batch_size=16"]
    _, _, result = trained(tmp_path, f"model={model}", *few)
    assert result["model"]["img_size"] == 224 and result["model"]["params"] > 20e6
