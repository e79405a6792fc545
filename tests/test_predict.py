"""src/predict.py, run as a user runs it."""

import csv
import sys

import pytest
import torch

from evit.data.folders import load_image
from evit.data.imagefolder import evaluation_transform
from tests.test_evaluate import micro

SIZE = dict(img_size=28, patch_size=7, embed_dim=96, depth=12, num_heads=3)


def sent(path, **more):
    """A checkpoint of training, away from its run."""
    model = dict(_target_="evit.models.create_model", model_name="evit_deit_tiny_patch16", **SIZE)
    reducer = dict(_target_="evit.reducers.Merge", keep_rate=0.6)
    knobs = dict(model=model | dict(reducer=reducer), keep_rate=0.6, fusion=True, img_size=28)
    knobs |= dict(crop_pct=0.7, data="pets", classes=["cat", "dog"], mean=[0.5] * 3, std=[0.2] * 3)
    weights = {f"model.{name}": weight for name, weight in micro().state_dict().items()}
    torch.save(dict(state_dict=weights, evit=knobs | more), path)
    return path


@pytest.fixture
def predict(monkeypatch, tmp_path, capfd):
    """Run src/predict.py in this process; what was printed."""
    import predict

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
        predict.main()
        return capfd.readouterr().out

    return run


@torch.no_grad()
def test_names_size_crop_and_normalisation_are_the_checkpoint_s(predict, photos, tmp_path):
    checkpoint = sent(tmp_path / "sent.ckpt")
    printed = predict(f"checkpoint={checkpoint}", f"images={photos}/val", "target=a/found.csv")
    with open(tmp_path / "a/found.csv") as file:
        rows = list(csv.DictReader(file))
    import evit

    model, crop = evit.reduce(micro(), "merge", keep_rate=0.6).eval(), evaluation_transform(28, 0.7)
    assert len(rows) == 12 and printed.count(".jpg: ") == 6
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        image = (crop(load_image(first["image"])) / 255 - 0.5) / 0.2
        wanted = dict(zip(("cat", "dog"), model(image[None]).softmax(1)[0].tolist(), strict=True))
        assert (first["rank"], second["rank"]) == ("1", "2")
        assert first["probability"] >= second["probability"]
        for row in (first, second):
            assert float(row["probability"]) == pytest.approx(wanted[row["class"]], abs=2e-6)


def test_a_batch_at_a_time_the_likeliest_alone(predict, photos, tmp_path):
    checkpoint = sent(tmp_path / "sent.ckpt")
    arguments = (f"checkpoint={checkpoint}", f"images={photos}/val", "top=1")
    whole = predict(*arguments)
    assert len(whole.splitlines()) == 6 and predict(*arguments, "batch_size=4") == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("images=photos", "give the weights, one of checkpoint=PATH"),
        ("checkpoint=sent.ckpt", "images=... is needed"),
        ("checkpoint=sent.ckpt images=nowhere.jpg", "images=nowhere.jpg does not exist"),
        ("checkpoint=sent.ckpt images=photos top=0", "top=0 and batch_size=32 must be at least 1"),
    ],
)
def test_what_cannot_be_predicted_is_said(predict, photos, tmp_path, capfd, arguments, message):
    sent(tmp_path / "sent.ckpt")
    with pytest.raises(SystemExit) as ended:
        predict(*arguments.split())
    assert ended.value.code == 2 and message in capfd.readouterr().err
