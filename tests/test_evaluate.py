"""src/evaluate.py, run as a user runs it."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import evit
from evit import files
from evit.commands import use as command
from evit.report import results
from tests.conftest import QUICK
from tests.conftest import command as program

MICRO = "model=evit_deit_micro img_size=28 trainer=cpu data.num_workers=0".split()


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def micro(num_classes: int = 2) -> evit.EViT:
    """conf/model/evit_deit_micro.yaml with random weights."""
    torch.manual_seed(0)
    options = dict(img_size=28, patch_size=7, embed_dim=96, depth=12, num_heads=3)
    return evit.EViT(num_classes=num_classes, **options).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A checkpoint as its authors would publish it."""
    path = tmp_path_factory.mktemp("weights") / "micro.pth"
    torch.save({"model": micro().state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shared_photos) -> Path:
    """A folder in which a run has finished: EMA, two epochs, fewer images than there are."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = [*QUICK, f"data.root={shared_photos}", "recipe.epochs=2", "recipe.ema_decay=0.9"]
    arguments += ["recipe.ema_evaluated=true"]
    arguments += ["keep_rate=0.6", "fusion=false", "recipe.crop_pct=0.7", "logger=none"]
    done = program("train.py", *arguments, "recipe.max_val_images=5", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capfd):
    """Run src/evaluate.py in this process; evaluation.json and what was printed."""
    import evaluate

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)

    def run(*arguments: object) -> dict:
        shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        result = json.loads(only(tmp_path, "outputs/*/*/evaluation.json").read_text())
        return result | dict(printed=capfd.readouterr().out)

    return run


@pytest.fixture
def refused(evaluate, tmp_path, capfd):
    """Run src/evaluate.py in this process, which fails and leaves nothing; its message."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            evaluate(*arguments)
        assert ended.value.code == 2
        assert not list(tmp_path.glob("outputs/**/*"))
        return capfd.readouterr().err

    return run


def metrics(result: dict) -> dict:
    """The metrics of each setting, by what tells it from the others."""
    names = ("top1", "top5", "loss", "images")
    return {
        (tuple(row["keep_rate"]), row["fusion"], row["selection"]): [row[n] for n in names]
        for row in result["settings"]
    }


def test_a_run_s_last_checkpoint_alone_gives_what_training_reported(finished, evaluate):
    """Model, data, keep rate, fusion, crop, limit and EMA weights come from the run."""
    reported = json.loads(only(finished, "outputs/*/*/result.json").read_text())
    path = only(finished, "outputs/*/*/checkpoints/last.ckpt")
    result = evaluate(f"checkpoint={path}", "trainer=cpu")
    (row,) = result["settings"]
    assert (row["keep_rate"], row["fusion"], row["images"]) == ([0.6] * 3, False, 5)
    assert (result["config"]["crop_pct"], result["data"]["backend"]) == (0.7, "ffcv")
    for name in ("top1", "top5", "loss"):
        assert row[name] == pytest.approx(reported[name], rel=1e-6)
    assert row["macs"] == reported["model"]["macs"]
    assert row["macs_executed"] == reported["model"]["macs_executed"]
    weights = torch.load(path, weights_only=True)
    average, current = (weights[k] for k in ("state_dict", "current_model_state"))
    assert not torch.equal(average["model.head.weight"], current["model.head.weight"])


def test_whatever_comes_from_the_run_can_be_changed(finished, evaluate, photos):
    path = only(finished, "outputs/*/*/checkpoints/best.ckpt")
    changes = "keep_rate=[0.9,0.8,0.5] fusion=true img_size=42 crop_pct=1 max_val_images=null"
    changes += f" data.root={photos} data.backend=imagefolder data.num_workers=0"
    result = evaluate(f"checkpoint={path}", *changes.split())
    (row,) = result["settings"]
    assert (row["keep_rate"], row["fusion"], row["images"]) == ([0.9, 0.8, 0.5], True, 6)
    assert result["config"]["data"]["root"] == str(photos)
    assert result["data"]["backend"] == "imagefolder"
    assert result["model"]["img_size"] == result["config"]["data"]["img_size"] == 42


def test_images_are_read_as_pil_reads_them(weights, photos, evaluate):
    """Top-1, top-5 and loss from an independent reading: PIL alone, the published protocol."""
    images, labels = [], []
    for label, name in enumerate(("cat", "dog")):
        for path in sorted((photos / "val" / name).iterdir()):
            image = Image.open(path).convert("RGB")  # 48 x 40 pixels
            image = image.resize((int(32 * 48 / 40), 32), Image.Resampling.BICUBIC)
            left = round((image.width - 28) / 2)
            image = image.crop((left, 2, left + 28, 30))
            pixels = torch.tensor(numpy.array(image)).permute(2, 0, 1) / 255
            mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[
                ..., None, None
            ]
            images.append((pixels - mean) / std)
            labels.append(label)
    model = micro()
    model.set_keep_rate(0.7)
    with torch.no_grad():
        logits = model(torch.stack(images))
    target = torch.tensor(labels)
    found = evaluate(f"checkpoint={weights}", f"data.root={photos}", *MICRO)
    (row,) = found["settings"]
    assert row["top1"] == pytest.approx(100 * (logits.argmax(1) == target).float().mean().item())
    assert row["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-5
    )
    assert found["data"]["backend"] == "imagefolder"


def test_settings_in_one_pass_equal_each_on_its_own(weights, shared_photos, evaluate):
    """To the digit, each in a program of its own."""
    arguments = [f"checkpoint={weights}", f"data.root={shared_photos}", *MICRO, "batch_size=4"]
    rates = "keep_rates=[1,[0.9,0.7,0.5]]"
    both = ["fusion=[true,false]", "selection=[random,inattentive]"]
    result = evaluate(*arguments, rates, *both)
    together = metrics(result)
    assert len(together) == len(result["settings"]) == 1 + 2 * 2
    assert len({tuple(values) for values in together.values()}) == 5
    alone: dict = {}
    for rate, fusion, selection in (
        ("1", "true", "attentive"),
        ("[0.9,0.7,0.5]", "true", "random"),
        ("[0.9,0.7,0.5]", "false", "inattentive"),
    ):
        one = [f"keep_rate={rate}", f"fusion={fusion}", f"selection={selection}"]
        alone |= metrics(evaluate(*arguments, *one))
    assert len(alone) == 3
    assert alone == {key: together[key] for key in alone}


def test_random_selection_is_a_matter_of_the_seed(weights, shared_photos, evaluate):
    arguments = [f"checkpoint={weights}", f"data.root={shared_photos}", *MICRO, "keep_rate=0.5"]
    arguments += ["selection=random"]
    first, again = (metrics(evaluate(*arguments, "seed=1")) for _ in range(2))
    other = metrics(evaluate(*arguments, "seed=2"))
    assert first == again != other


def test_a_folder_with_only_val_will_do_and_nothing_is_written(weights, photos, evaluate, tmp_path):
    arguments = [f"checkpoint={weights}", f"data.root={photos}", *MICRO]
    whole = metrics(evaluate(*arguments))
    shutil.rmtree(photos / "train")
    assert metrics(evaluate(*arguments)) == whole
    assert not list(tmp_path.glob("data/**/*"))
    ffcv = evaluate(*arguments, "data.backend=ffcv")
    assert {path.name for path in tmp_path.glob("data/*/*")} == {"val.beton", "val.beton.json"}
    assert ffcv["images"] == 6 and ffcv["data"]["backend"] == "ffcv"


def test_the_classes_are_those_of_train_where_it_is_there(weights, photos, evaluate):
    shutil.rmtree(photos / "val" / "cat")
    result = evaluate(f"checkpoint={weights}", f"data.root={photos}", *MICRO)
    assert (result["data"]["num_classes"], result["images"]) == (2, 3)


def test_prepared_files_are_read_without_being_asked_for(weights, photos, evaluate, tmp_path):
    from evit.commands.prepare import prepare

    folder = prepare(photos, tmp_path / "betons", mode="jpg", max_resolution=None, jpeg_quality=95)
    for path in folder.glob("train*"):
        path.unlink()
    result = evaluate(f"checkpoint={weights}", f"data.root={folder}", *MICRO)
    assert (result["data"]["backend"], result["images"]) == ("ffcv", 6)


def test_two_processes_evaluate_each_image_once(weights, photos, tmp_path, evaluate):
    """5 images over 2 processes: the metrics of one."""
    next((photos / "val/dog").iterdir()).unlink()
    arguments = [f"checkpoint={weights}", f"data.root={photos}", *MICRO, "batch_size=2"]
    arguments += ["keep_rates=[1,0.5]", "reducer=[evit,drop]"]
    found = [evaluate(*arguments)]
    arguments[arguments.index("trainer=cpu")] = "trainer=ddp"
    (tmp_path / "two").mkdir()
    two = "trainer.accelerator=cpu", "trainer.devices=2"
    done = program("evaluate.py", *arguments, *two, cwd=tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Evaluating 3 settings") == 1  # said once, not by each process
    found.append(json.loads(only(tmp_path, "two/outputs/*/*/evaluation.json").read_text()))
    assert [result["processes"] for result in found] == [1, 2]
    assert [result["images"] for result in found] == [5, 5]
    for one, two in zip(found[0]["settings"], found[1]["settings"], strict=True):
        for name in ("top1", "top5", "loss"):
            assert one[name] == pytest.approx(two[name], rel=1e-5)
        assert one["kl"] == pytest.approx(two["kl"], abs=1e-6)


def test_the_table_has_a_row_for_each_setting_and_the_difference_to_dense(
    weights, shared_photos, evaluate
):
    arguments = [f"checkpoint={weights}", f"data.root={shared_photos}", *MICRO]
    result = evaluate(*arguments, "keep_rates=[1,0.7,0.5]", "fusion=[true,false]")
    dense, *others = result["settings"]
    printed = [line.replace("|", "").split() for line in result["printed"].splitlines()]
    for row in others:
        numbers = [f"{row['top1']:.2f}", f"{row['top1'] - dense['top1']:+.2f}"]
        numbers += [f"{row['kl']:.4f}"]
        numbers += [f"{row['top5']:.2f}", f"{row['loss']:.4f}", f"{row['macs'] / 1e9:.3f}"]
        numbers += [f"{row['macs_executed'] / 1e9:.3f}"]
        fusion = {True: "fused", False: "dropped"}[row["fusion"]]
        assert [fusion, *numbers] in [line[-8:] for line in printed]
    assert max(map(len, result["printed"].splitlines()[2:10])) <= 80


def test_reducers_side_by_side_are_each_on_its_own(weights, shared_photos, evaluate):
    """Numbers to the digit, and the divergence from the dense model as PyTorch has it."""
    arguments = [f"checkpoint={weights}", f"data.root={shared_photos}", *MICRO]
    result = evaluate(*arguments, "keep_rates=[1,0.5]", "reducer=[evit,merge,tome]")
    rows = {row["reducer"]: row for row in result["settings"]}
    assert list(rows) == [None, "evit", "merge", "tome"] and rows[None]["kl"] == 0
    printed = [line.split() for line in result["printed"].splitlines()]
    for name in ("merge", "tome"):
        (alone,) = evaluate(*arguments, "keep_rate=0.5", f"reducer={name}")["settings"]
        assert alone == rows[name] and alone["kl"] > 0
        assert any(name in line and f"{alone['kl']:.4f}" in line for line in printed)


def test_off_a_terminal_it_tells_how_far_it_is_in_each_batch(
    weights, shared_photos, evaluate, monkeypatch
):
    real = F.cross_entropy

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", slow)
    monkeypatch.setattr(command, "telling", lambda text: files.telling(text, 0.01))
    arguments = [f"checkpoint={weights}", f"data.root={shared_photos}", *MICRO, "batch_size=4"]
    told = evaluate(*arguments, "keep_rates=[1,0.5]", "reducer=[evit,drop]")["printed"]
    for batch in (1, 2):
        for setting in (1, 2, 3):
            assert f"  evaluating: batch {batch}/2, setting {setting}/3\n" in told


def test_budgets_find_the_keep_rate_of_each_reducer(weights, shared_photos, evaluate):
    arguments = [f"checkpoint={weights}", f"data.root={shared_photos}", *MICRO]
    result = evaluate(*arguments, "gmacs=0.02", "reducer=[evit,merge]")
    evit_row, merge_row = result["settings"]
    assert evit_row["keep_rate"] != merge_row["keep_rate"]
    assert all(0.018e9 < row["macs"] <= 0.02e9 for row in (evit_row, merge_row))


def test_a_reducer_from_outside(weights, shared_photos, evaluate, plug_in):
    arguments = [f"checkpoint={weights}", f"data.root={shared_photos}", *MICRO, "reducer.power=2"]
    result = evaluate(*arguments, "keep_rates=[1,0.5]", "reducer=[mine,drop]", plug_in)
    assert [row["reducer"] for row in result["settings"]] == [None, "mine", "drop"]


def test_a_run_with_a_reducer_from_outside_needs_its_folder(
    tmp_path, shared_photos, evaluate, refused, plug_in
):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    path = tmp_path / "run/checkpoints/best.ckpt"
    torch.save({f"model.{name}": weight for name, weight in micro().state_dict().items()}, path)
    size = dict(img_size=28, patch_size=7, embed_dim=96, depth=12, num_heads=3)
    node = dict(_target_="mypackage.Mine", keep_rate=0.6, power=2.0)
    model = dict(_target_="evit.models.create_model", model_name="evit_deit_tiny_patch16")
    config = dict(model=model | size | dict(reducer=node), keep_rate=0.6, img_size=28, recipe={})
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    arguments = [f"checkpoint={tmp_path}/run", f"data.root={shared_photos}", *MICRO[2:]]
    shown = refused(*arguments)
    assert "it asks to call mypackage.Mine" in shown and "--config-dir DIR" in shown
    (row,) = evaluate(*arguments, plug_in)["settings"]
    assert (row["reducer"], row["keep_rate"]) == ("mine", [0.6] * 3)


def test_a_checkpoint_away_from_its_folder_tells_its_model(
    tmp_path, shared_photos, evaluate, refused
):
    """By what training writes into it, under "evit"."""
    from tests.test_predict import sent

    arguments = [f"checkpoint={sent(tmp_path / 'sent.ckpt')}", *MICRO[2:]]
    at = f"data.root={shared_photos}"
    result = evaluate(*arguments, at)
    (row,) = result["settings"]
    assert (row["reducer"], row["keep_rate"]) == ("merge", [0.6] * 3)
    assert result["config"]["crop_pct"] == 0.7
    (other,) = evaluate(*arguments, at, "reducer=drop", "keep_rate=0.5")["settings"]
    assert (other["reducer"], other["keep_rate"]) == ("drop", [0.5] * 3)
    sent(tmp_path / "sent.ckpt", mean=[0.1] * 3)
    assert evaluate(*arguments, at)["settings"][0]["loss"] != row["loss"]
    shown = refused(*arguments, at, "model=evit_deit_micro", "model.embed_dim=48")
    assert "does not fit" in shown and "the run had model=evit_deit_tiny_patch16" in shown
    sent(tmp_path / "sent.ckpt", classes=["ant", "bee"])
    assert (
        "has 2 classes, ant to bee, and photos has 2 classes, cat to dog: give the data"
        in refused(*arguments, at)
    )
    assert (
        "the checkpoint has 2 classes, ant to bee, and fashion-mnist has 10 classes, "
        in refused(*arguments)
    )


def test_compiled_and_in_bf16_it_gives_about_the_same(
    weights, shared_photos, evaluate, monkeypatch
):
    """What a GPU does by default; the last batch, which is smaller, is not compiled."""
    sizes = []

    def compiled(function, **options):
        def run(x, *rest, **more):
            sizes.append(len(x))
            return function(x, *rest, **more)

        return run

    arguments = [f"checkpoint={weights}", f"data.root={shared_photos}", *MICRO, "batch_size=4"]
    arguments += ["keep_rates=[1,0.5]", "reducer=cover"]
    plain = evaluate(*arguments)
    assert (plain["precision"], sizes) == ("32-true", [])
    monkeypatch.setattr(torch, "compile", compiled)
    fast = evaluate(*arguments, "compile=true", "trainer.precision=bf16-true")
    assert fast["precision"] == "bf16-true, compiled" and "bf16-true, compiled" in fast["printed"]
    assert set(sizes) == {4, 2}
    for one, two in zip(plain["settings"], fast["settings"], strict=True):
        assert two["images"] == 6 and one["macs_executed"] == two["macs_executed"]
        assert two["loss"] == pytest.approx(one["loss"], rel=0.02)
        assert two["kl"] == pytest.approx(one["kl"], abs=0.01)


def test_a_result_carries_its_provenance(weights, shared_photos, evaluate):
    result = evaluate(f"checkpoint={weights}", f"data.root={shared_photos}", *MICRO)
    assert result["packages"]["torch"] == torch.__version__.split("+")[0]
    assert len(result["checkpoint_sha256"]) == 64
    assert result["config"]["model"]["img_size"] == 28
    assert {"commit", "device", "seconds", "precision", "processes", "python"} <= set(result)


@pytest.fixture(scope="module")
def deit(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("deit") / "deit.pth"
    torch.save(timm.create_model("deit_tiny_patch16_224", num_classes=2).state_dict(), path)
    return path


DEIT = "model.model_name=deit_tiny_patch16_224 img_size=32 trainer=cpu data.num_workers=0".split()


def test_any_timm_vit_is_evaluated_as_an_evit(deit, shared_photos, evaluate):
    arguments = [f"checkpoint={deit}", f"data.root={shared_photos}", "model=timm_vit", *DEIT]
    dense, half = evaluate(*arguments, "keep_rates=[1,0.5]")["settings"]
    assert half["macs_executed"] < dense["macs_executed"]


def test_a_timm_model_as_it_stands_is_refused_with_the_way_to_take_it(deit, shared_photos, refused):
    arguments = [f"checkpoint={deit}", f"data.root={shared_photos}", *DEIT]
    plain = [
        "+model._target_=timm.create_model",
        *(f"+{a}" for a in DEIT[:1]),
        "+model.img_size=32",
    ]
    plain = [*plain, *arguments[:2], *DEIT[2:]]
    message = "VisionTransformer reduces no tokens: take it with a reducer by model=timm_vit"
    assert message in refused(*plain)


def test_dynamicvit_has_no_fusion_and_no_selection_and_is_evaluated_once(
    shared_photos, evaluate, tmp_path
):
    options = dict(img_size=28, patch_size=7, embed_dim=96, depth=12, num_heads=3)
    torch.save(evit.DynamicViT(num_classes=2, **options).state_dict(), tmp_path / "d.pth")
    arguments = [f"checkpoint={tmp_path}/d.pth", f"data.root={shared_photos}", *MICRO[1:]]
    arguments += ["model=dynamicvit_deit_micro", "keep_rates=[1,0.7]"]
    result = evaluate(*arguments, "fusion=[true,false]", "selection=[attentive,random]")
    assert "DynamicViT has no selection and no fusion" in result["printed"]
    assert list(metrics(result)) == [((1.0,) * 3, None, None), ((0.7,) * 3, None, None)]


MISTAKES = {
    "reducer=nosuch": "nosuch",
    "reducer=[evit,nosuch]": "nosuch",
    "reducer.foo=1": "foo",
    "+reducer.foo=1": "got an unexpected keyword argument 'foo'",
    "reducer=dynamicvit": "reducer dynamicvit has to be trained",
    "gmacs=[9]": "gmacs must be from 0.0",
    "keep_rate=0": "keep_rate must be in (0, 1]",
    "keep_rates=[0.5,1.5]": "got 1.5",
    "keep_rates=[[0.9,0.7]]": "one for each of 3 reorganizations, got [0.9, 0.7]",
    "img_size=30": "img_size 30 is not a multiple of the patch size 7: take 28 or 35",
    "selection=attentiv": "selection must be one of attentive, random, inattentive, got 'attentiv'",
    "selection=[random,best]": "selection must be one of attentive, random, inattentive",
    "fusion=perhaps": "fusion must be true, false or [true,false], got 'perhaps'",
    "batch_size=0": "batch_size must be from 1 to inf, got 0",
    "crop_pct=0": "crop_pct must be from 0.01 to 1, got 0",
    "max_val_images=0": "max_val_images must be from 1 to inf, got 0",
    "checkpoint=nowhere.pth": "checkpoint 'nowhere.pth' does not exist",
    "checkpoint=null": "give the weights, one of checkpoint=PATH",
    "keeprates=[1]": "unknown knob 'keeprates' in 'keeprates=[1]': did you mean keep_rates?",
    "data.root=/nowhere": "data folder '/nowhere' does not exist: expected /nowhere/val/CLASS",
    "model.embed_dim=48": "checkpoint does not fit ReducedViT",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_leaves_nothing(mistake, weights, photos, refused):
    arguments = [f"checkpoint={weights}", f"data.root={photos}", *MICRO]
    arguments = [a for a in arguments if a.split("=")[0] != mistake.split("=")[0]]
    shown = refused(*arguments, mistake)
    assert MISTAKES[mistake] in shown and shown.count("\n") == 1


def test_a_model_that_has_diverged_has_no_accuracy(photos, refused, tmp_path):
    model = micro()
    model.head.bias.data[0] = torch.inf
    torch.save(model.state_dict(), tmp_path / "bad.pth")
    shown = refused(f"checkpoint={tmp_path}/bad.pth", f"data.root={photos}", *MICRO)
    assert "the loss is nan at keep_rate 0.7/0.7/0.7" in shown and "diverged" in shown


def test_a_checkpoint_that_is_no_run_s_needs_a_model(weights, photos, refused):
    shown = refused(f"checkpoint={weights}", f"data.root={photos}")
    assert "model=NAME is needed, as in model=evit_deit" in shown


def test_another_number_of_classes_is_named(weights, photos, refused):
    shutil.copytree(photos / "val/dog", photos / "val/wolf")
    shutil.rmtree(photos / "train")
    shown = refused(f"checkpoint={weights}", f"data.root={photos}", *MICRO)
    assert (
        "the checkpoint has 2 classes, 0 to 1, and photos has 3 classes, cat to wolf: give the data"
        in shown
    )


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_checkpoint_is_executed(photos, tmp_path, refused):
    torch.save({"model": Attack(tmp_path / "owned")}, tmp_path / "evil.pth")
    shown = refused(f"checkpoint={tmp_path}/evil.pth", f"data.root={photos}", *MICRO)
    assert "evil.pth' cannot be read" in shown
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("part", ["model", "data"])
def test_a_run_s_configuration_cannot_call_foreign_code(tmp_path, part):
    config = {"recipe": {}, "model": {}, "data": {}} | {part: {"_target_": "os.system"}}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json is not .* asks to call os.system"):
        results.run_config(tmp_path / "checkpoints/best.ckpt")
