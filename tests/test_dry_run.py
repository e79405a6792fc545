"""src/train.py --dry-run, as a user runs it."""

import sys

import pytest
import torch
import yaml

from tests.conftest import QUICK


@pytest.fixture
def dry_run(monkeypatch, tmp_path, capsys):
    """Run src/train.py --dry-run in an empty folder, in this process; what it prints, as YAML."""
    import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)

    def run(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "--dry-run"])
        train.main()
        return yaml.safe_load(capsys.readouterr().out)

    return run


def test_a_published_run_is_shown_without_its_images_and_leaves_nothing(dry_run, tmp_path):
    shown = dry_run("experiment=evit_deit_s", "keep_rate=0.5")
    assert shown["data"]["name"] == "ImageNet" and shown["data"]["train_images"] == 1281167
    assert shown["steps_per_epoch"] == 625
    assert shown["start"] == "random" and shown["loss"] == "Classification"
    assert "78.5 top-1 (keep_rate_deit_s)" in shown["paper"]
    assert shown["hours"] == "about 9 h on 8 A100, from the paper's images/s"
    assert not list(tmp_path.iterdir())


def test_the_rates_are_shown_every_tenth_epoch(dry_run):
    schedule = dry_run("experiment=evit_deit_s", "keep_rate=0.5")["schedule"]
    assert schedule["lr"][0] == 1e-6 and schedule["keep_rate"][0] == 1
    assert {60, 110, 290, 299} <= set(schedule["lr"]) == set(schedule["keep_rate"])
    assert schedule["keep_rate"][110] == 0.5 < schedule["keep_rate"][60] < 1
    different = dry_run("experiment=evit_deit_s", "keep_rate=[0.9,0.7,0.5]")["schedule"]
    assert different["keep_rate"][299] == [0.9, 0.7, 0.5]


def test_images_of_ones_own_are_counted(dry_run, photos, tmp_path):
    before = set(tmp_path.iterdir())
    shown = dry_run(*QUICK, f"data.root={photos}", "data.backend=imagefolder")
    assert shown["data"] == dict(
        name="photos", num_classes=2, train_images=12, val_images=6, label_maps=False
    )
    assert shown["steps_per_epoch"] == 3
    assert shown["paper"] == [] and shown["hours"] is None
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("root", ["photos", "nowhere"])
def test_what_a_run_refuses_the_plan_refuses(dry_run, root, photos, capsys):
    """ImageNet's recipe on a folder that is not ImageNet, or not there."""
    with pytest.raises(SystemExit) as ended:
        dry_run("experiment=evit_deit_s", f"data.root={root}")
    assert ended.value.code == 2
    reason = "has 2 classes, class 0 is" if root == "photos" else "does not exist"
    assert reason in capsys.readouterr().err


def test_fine_tuning_says_what_it_starts_from(dry_run):
    assert dry_run("experiment=evit_deit_s_finetune")["start"] == "missing"
    assert dry_run("experiment=evit_deit_s_finetune", "pretrained=true")["start"] == "pretrained"


def test_no_weights_are_made(dry_run, monkeypatch):
    made = []

    def refuse(tensor, *_, **__):
        assert tensor.is_meta
        made.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch.nn.init, "trunc_normal_", refuse)
    assert dry_run("experiment=lvvit_s")["steps_per_epoch"] == 1251
    assert made
