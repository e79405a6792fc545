"""src/train.py --dry-run, as a user runs it."""

import sys

import pytest
import torch

from tests.conftest import QUICK


@pytest.fixture
def dry_run(monkeypatch, tmp_path, capsys):
    """Run src/train.py --dry-run in an empty folder, in this process; what it prints."""
    import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("IMAGENET_DIR", raising=False)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        train.main()
        return capsys.readouterr().out

    return run


def test_a_published_run_is_shown_without_its_images_and_leaves_nothing(dry_run, tmp_path):
    shown = dry_run("experiment=evit_deit_s", "keep_rate=0.5", "data.root=/nowhere", "--dry-run")
    for text in (
        "ImageNet: 1,281,167 images of 1000 classes",
        "300, each of 625 steps",
        "128 on 16 processes, 1 accumulated",
        "102 tensors, 138,088 parameters: weight decay 0, lr x 1",
        "CutMix, alpha 1.0",
        "78.5 top-1 (keep_rate_deit_s)",
        "h on 8 A100, from the paper's images/s",
    ):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert not list(tmp_path.iterdir())


def test_the_rates_are_shown_where_they_change_and_every_tenth_epoch(dry_run):
    shown = dry_run("experiment=evit_deit_s", "keep_rate=0.5", "data.root=/nowhere", "--dry-run")
    rates = shown.split("at the beginning of an epoch")[1].split()
    cells = {tuple(rates[i + 1 : i + 3]) for i, word in enumerate(rates) if word in ("0", "1")}
    assert ("1.00e-06", "1.000") in cells
    assert {"60", "110", "290", "299"} <= set(rates)


def test_images_of_ones_own_are_counted(dry_run, photos, tmp_path):
    before = set(tmp_path.iterdir())
    shown = dry_run(*QUICK, f"data.root={photos}", "data.backend=imagefolder", "--dry-run")
    assert "photos: 12 images of 2 classes, 6 to evaluate on" in shown
    assert "1, each of 3 steps" in shown and "has no such row" in shown
    assert set(tmp_path.iterdir()) == before


def test_fine_tuning_says_what_it_starts_from(dry_run):
    arguments = ("experiment=evit_deit_s_finetune", "data.root=/nowhere", "--dry-run")
    assert "to be given: checkpoint=PATH, or pretrained=true" in dry_run(*arguments)
    assert "timm's weights of the dense model" in dry_run(*arguments, "pretrained=true")


def test_no_weights_are_made(dry_run, monkeypatch):
    def refuse(tensor, *_, **__):
        assert tensor.is_meta
        return tensor

    monkeypatch.setattr(torch.nn.init, "trunc_normal_", refuse)
    assert "26,016,960 parameters" in dry_run("experiment=lvvit_s", "--dry-run")
