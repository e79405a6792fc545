"""src/train.py, run as a user runs it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evit
from evit.commands.report import KEYS
from tests.conftest import QUICK, command


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without the times, and the rows that are nothing else."""
    lines = only(folder, "outputs/*/*/metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "train/images_per_s", "train/data_wait")
    parsed = [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]
    return [row for row in parsed if set(row) - {"step", "epoch"}]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shared_photos) -> Path:
    """A folder in which one run on photos has finished."""
    folder = tmp_path_factory.mktemp("finished")
    done = command("train.py", *QUICK, f"data.root={shared_photos}", "recipe.epochs=2", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def result(finished) -> dict:
    return json.loads(only(finished, "outputs/*/*/result.json").read_text())


def test_a_run_leaves_its_result_with_its_provenance(result):
    assert 0 <= result["top1"] <= result["top5"] == 100
    assert result["model"]["params"] > 1_000_000
    assert result["model"]["macs"] > result["model"]["macs_executed"] > 0
    assert result["model"]["keep_rate"] == [0.7] * 3
    assert result["config"]["recipe"]["epochs"] == 2
    assert result["choices"]["model"] == "evit_deit_micro"
    assert result["packages"]["torch"] == torch.__version__.split("+")[0]
    assert {"commit", "device", "seconds", "wandb_id", "precision", "processes"} <= set(result)


def test_the_table_shows_the_result_and_where_the_files_are(finished, result):
    shown = (finished / "stdout").read_text()
    assert f"{result['top1']:.2f} %" in shown
    assert "outputs/dev/" in shown and "metrics.jsonl" in shown


def test_metrics_are_logged_at_steps_and_evaluations(finished):
    seen = {name for row in rows(finished) for name in row}
    assert {"train/loss", "lr", "keep_rate", "tokens_per_image"} <= seen
    assert {"val/loss", "val/top1", "val/top5", "step", "epoch"} <= seen


def test_the_picture_of_the_surviving_patches_is_drawn(finished):
    picture = only(finished, "outputs/*/*/kept_patches.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 1000


def test_checkpoints_hold_plain_data_and_load_into_the_model(finished, result):
    for name in ("last", "best"):
        path = only(finished, f"outputs/*/*/checkpoints/{name}.ckpt")
        torch.load(path, weights_only=True)
        model = evit.EViT(
            img_size=28, patch_size=7, embed_dim=96, depth=12, num_heads=3, num_classes=2
        )
        evit.load_checkpoint(model, path)


def test_wandb_has_the_run_offline(finished, result):
    path = only(finished, f"outputs/*/*/wandb/offline-run-*-{result['wandb_id']}/*.wandb")
    assert path.stat().st_size > 1000


def test_wandb_has_the_pictures_of_each_evaluation_and_the_numbers_of_comparisons(finished, result):
    media = only(finished, "outputs/*/*/wandb/offline-run-*/files/media")
    assert len(list(media.glob("images/kept_patches_*.jpg"))) == 2
    table = json.loads(only(media, "table/result_*.table.json").read_text())
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert set(KEYS) <= set(row) and result["throughput"] > 0
    assert (row["model"], row["top1"]) == ("evit_deit_micro", result["top1"])
    assert (row["throughput"], row["img_size"]) == (result["throughput"], 28)


def test_a_finished_run_is_shown_and_not_repeated(finished, shared_photos, result):
    before = only(finished, "outputs/*/*/result.json").stat().st_mtime_ns
    arguments = [*QUICK, f"data.root={shared_photos}", "recipe.epochs=2"]
    again = command("train.py", *arguments, cwd=finished)
    assert again.returncode == 0, again.stderr
    assert "finished before: overwrite=true repeats it" in again.stdout
    assert f"{result['top1']:.2f} %" in again.stdout
    assert only(finished, "outputs/*/*/result.json").stat().st_mtime_ns == before


def test_the_same_seed_gives_the_same_metrics(finished, shared_photos, tmp_path):
    arguments = [*QUICK, f"data.root={shared_photos}", "recipe.epochs=2"]
    again = command("train.py", *arguments, "data.num_workers=1", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path) == rows(finished)


def test_a_run_killed_after_its_last_epoch_is_evaluated_and_finished(
    finished, result, shared_photos, tmp_path
):
    shutil.copytree(finished / "outputs", tmp_path / "outputs")
    path = only(tmp_path, "outputs/*/*/result.json")
    path.unlink()
    rows = path.with_name("metrics.jsonl").read_text()
    arguments = [*QUICK, f"data.root={shared_photos}", "recipe.epochs=2"]
    again = command("train.py", *arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    found = json.loads(path.read_text())
    assert [found[k] for k in ("top1", "top5")] == [result["top1"], result["top5"]]
    assert found["loss"] == pytest.approx(result["loss"])
    assert path.with_name("metrics.jsonl").read_text() == rows


def test_a_run_of_another_configuration_is_not_overwritten(finished, shared_photos):
    path = only(finished, "outputs/*/*/config.json")
    before = path.read_text()
    path.write_text(before.replace('"flip": 0.5', '"flip": 0.4'))
    arguments = [*QUICK, f"data.root={shared_photos}", "recipe.epochs=2"]
    refused = command("train.py", *arguments, cwd=finished)
    path.write_text(before)
    assert refused.returncode == 2
    assert "another configuration" in refused.stderr and "overwrite=true" in refused.stderr


MISTAKES = {
    "keep_rate=0": "keep_rate must be in (0, 1]",
    "keep_rate=1.5": "got 1.5",
    "keep_rate=lots": "got 'lots'",
    "img_size=225": "img_size 225 is not a multiple of the patch size 7: take 224 or 231",
    "keeprate=0.5": "unknown knob 'keeprate' in 'keeprate=0.5': did you mean keep_rate?",
    "recipe.epoch=3": "did you mean recipe.epochs?",
    "+trainer.max_epoch=3": "unexpected keyword argument 'max_epoch'",
    "+trainer.max_steps=3": "trainer.max_steps is not taken here: set recipe.epochs",
    "trainer.precision=bf16-true": "must be one of auto, 32-true, bf16-mixed, 16-mixed",
    "+model.in_chans=1": "model.in_chans=1: images are read as RGB, gray ones too",
    "model.img_size=[28,56]": "model.img_size=[28, 56]: images are squares, of img_size=28",
    "img_size=[28,56]": "img_size must be a number, got",
    "compile=fast": "compile must be one of true, false, reduce-overhead, got 'fast'",
    "recipe.batch_size=5": "5 images per process is odd",
    "recipe.batch_size=64": "do not fill one batch of 64",
    "data.root=/nowhere": "data folder '/nowhere' does not exist",
    "recipe.finetune=true": "this recipe fine-tunes a trained model: give its weights",
    "recipe.lr_schedule=step": "recipe.lr_schedule must be plain, timm, deit, got 'step'",
    "logger.mode=loud": "logger.mode must be",
    "data.backend=dali": "data.backend must be ffcv or imagefolder",
    "resume=lost.ckpt": "lost.ckpt' does not exist: give the path of a file",
    "checkpoint_every_n_steps=0": "checkpoint_every_n_steps must be at least 1, got 0",
    "keep_checkpoint_every_n_epochs=0": "keep_checkpoint_every_n_epochs must be at least 1",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_at_once_and_leaves_nothing(mistake, photos, tmp_path, in_process):
    shown = in_process(*QUICK, f"data.root={photos}", *mistake.split())
    assert MISTAKES[mistake] in shown
    assert not list(tmp_path.glob("outputs/**/*"))


def no_train(root):
    for path in sorted(root.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def no_val(root):
    (root / "val").rename(root / "test")


def strange_class(root):
    (root / "val/dog").rename(root / "val/wolf")


def broken_jpeg(root):
    path = root / "train/dog/3.jpg"
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_train, "no class folders in train/"),
        (no_val, "no class folders in val/"),
        (strange_class, "has classes that train/ lacks: wolf"),
        (broken_jpeg, r"train/dog/3.jpg is not a readable image"),
    ],
)
def test_a_data_folder_that_cannot_serve_is_named_and_nothing_is_left(
    damage, message, photos, tmp_path, in_process
):
    damage(photos)
    assert message in in_process(*QUICK, f"data.root={photos}")
    assert not [p for p in tmp_path.glob("outputs/**/*")]
    assert not [p for p in tmp_path.glob("data/**/*") if p.is_file()]


def test_a_beton_cut_in_half_is_named(photos, tmp_path, in_process):
    from evit.commands.prepare import prepare

    folder = prepare(photos, tmp_path / "betons", mode="jpg", max_resolution=None, jpeg_quality=95)
    path = folder / "train.beton"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shown = in_process(*QUICK, f"data.root={folder}")
    assert "betons/train.beton" in shown and "prepare" in shown


@pytest.mark.parametrize("backend", ["ffcv", "imagefolder"])
def test_a_damaged_image_ends_an_epoch_with_its_name_and_no_traceback(backend, photos, tmp_path):
    if backend == "ffcv":
        from evit.commands.prepare import prepare
        from evit.data.ffcv import ALLOCATION, HEADER

        root = prepare(photos, tmp_path / "betons", mode="jpg", max_resolution=None)
        content = bytearray((root / "train.beton").read_bytes())
        table = int(np.frombuffer(content, HEADER, 1)["alloc_table_ptr"][0])
        start = int(np.frombuffer(content, ALLOCATION, offset=table)["ptr"][3])
        content[start : start + 40] = bytes(40)
        (root / "train.beton").write_bytes(content)
        message = f"error: {root}/train.beton: the JPEG of sample 3 is damaged; delete it"
    else:
        root = photos
        broken_jpeg(root)
        message = f"error: {root}/train/dog/3.jpg is not a readable image"
    options = [f"data.root={root}", f"data.backend={backend}", "logger.mode=disabled"]
    done = command("train.py", *QUICK, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("outputs/**/result.json"))


def test_a_checkpoint_of_another_architecture_is_named(photos, tmp_path, in_process):
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 384)}}, tmp_path / "other.pth")
    shown = in_process(*QUICK, f"data.root={photos}", f"checkpoint={tmp_path}/other.pth")
    assert "checkpoint does not fit ReducedViT" in shown and "(1, 1, 384)" in shown


@pytest.fixture
def in_process(monkeypatch, tmp_path, capfd):
    """Run src/train.py in this process; the message that it ends with."""
    import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            train.main()
        assert ended.value.code == 2
        return capfd.readouterr().err

    return run


def test_lightnings_own_loggers_may_be_chosen(photos, tmp_path, monkeypatch):
    import train

    monkeypatch.chdir(tmp_path)
    arguments = [*QUICK, f"data.root={photos}", "logger=csv"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()
    assert "val/top1" in only(tmp_path, "outputs/*/*/csv/metrics.csv").read_text()
    assert only(tmp_path, "outputs/*/*/metrics.jsonl").is_file()
    assert not list(tmp_path.glob("outputs/*/*/wandb"))


def test_the_published_recipe_runs_in_every_part(photos, tmp_path):
    """Mixup, EMA, warm-up and annealing together, on photos, for three epochs."""
    overrides = "img_size=28 model=evit_deit_micro trainer=cpu recipe.epochs=3 recipe.batch_size=4 "
    overrides += "recipe.warmup_epochs=1 recipe.shrink_start_epoch=1 recipe.shrink_epochs=1 "
    overrides += "recipe.eval_every=2 recipe.ema_decay=0.9 trainer.log_every_n_steps=1 "
    overrides += "recipe.max_batch_per_process=2"
    done = command("train.py", f"data.root={photos}", *overrides.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rates = [row["keep_rate"] for row in rows(tmp_path) if "keep_rate" in row]
    assert rates[:3] == [1.0] * 3 and rates[-3:] == pytest.approx([0.7] * 3)
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False)) and 0.7 < rates[4] < 1
    assert sum("val/top1" in row for row in rows(tmp_path)) == 2  # after epochs 2 and 3
    assert only(tmp_path, "outputs/*/*/kept_patches.png").is_file()
    last = torch.load(only(tmp_path, "outputs/*/*/checkpoints/last.ckpt"), weights_only=True)
    assert last["epoch"] == 2 and last["global_step"] == 9
