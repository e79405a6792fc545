"""src/visualize.py, run as a user runs it."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evit.commands import use as command
from evit.data.batch import normalize
from evit.models import create_model
from evit.report.pictures import draw_kept

SIZE = dict(img_size=32, embed_dim=48, depth=4, num_heads=3)
RANDOM = "model=evit_deit_tiny random=true img_size=32 " + " ".join(
    f"+model.{name}={value}" for name, value in SIZE.items() if name != "img_size"
)


@pytest.fixture
def visualize(monkeypatch, tmp_path, capfd):
    """Run src/visualize.py in this process; what was printed."""
    import visualize

    monkeypatch.chdir(tmp_path)

    def run(arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["visualize.py", *arguments.split()])
        visualize.main()
        return capfd.readouterr().out

    return run


@pytest.fixture
def drawn(monkeypatch):
    """The (model, images, pixels) that are drawn."""
    calls = []
    monkeypatch.setattr(command, "draw_kept", lambda *a: calls.append(a) or draw_kept(*a))
    return calls


def test_a_picture_of_any_images(visualize, drawn, photos, tmp_path):
    printed = visualize(f"{RANDOM} images={photos} num_images=4 keep_rate=0.5")
    (path,) = tmp_path.glob("outputs/pictures/evit_deit_tiny-evit-0.5-32-*.png")
    assert "Drawing 4 images at keep rate 0.5" in printed and path.name in printed
    ((model, images, pixels, *_),) = drawn
    assert pixels.shape == (4, 3, 32, 32) and model.keep_rate == (0.5,) * 3
    torch.testing.assert_close(images, normalize(pixels))
    with Image.open(path) as picture:
        assert picture.size[0] > 4 * 128 and picture.size[1] > 4 * 128


def test_a_picture_of_a_merging_reducer(visualize, drawn, photos, tmp_path):
    visualize(f"{RANDOM} images={photos} num_images=2 reducer=tome keep_rate=0.6")
    assert list(tmp_path.glob("outputs/pictures/evit_deit_tiny-tome-0.6-32-*.png"))
    assert drawn[0][0].reducer.name == "tome"


def test_pictures_of_other_images_or_weights_are_other_files(visualize, photos, tmp_path):
    """The same command makes the same file."""
    for more in ("", "num_images=2", "seed=1", ""):
        visualize(f"{RANDOM} images={photos}/val/cat keep_rate=0.5 {more}")
    visualize(f"{RANDOM} images={photos}/val/dog keep_rate=0.5")
    assert len(list(tmp_path.glob("outputs/pictures/*.png"))) == 4


def test_the_images_of_a_folder_are_spread_over_it(photos):
    every = command.image_paths(str(photos))
    assert len(every) == 18 == len(command.image_paths(str(photos), 30))
    assert command.image_paths(str(photos), 6) == every[::3]


def test_images_are_cropped_as_in_evaluations(visualize, drawn, photos):
    one, two = photos / "val/cat/0.jpg", photos / "val/dog/1.jpg"
    visualize(f"{RANDOM} images=[{one},{two}] num_images=1 target=kept.jpg crop_pct=0.8")
    ((_, _, pixels, *_),) = drawn
    image = Image.open(two).convert("RGB").resize((48, 40), Image.Resampling.BICUBIC)
    wanted = np.asarray(image.crop((8, 4, 40, 36))).transpose(2, 0, 1)
    assert len(pixels) == 2  # those that are named are all drawn
    np.testing.assert_allclose(pixels[1].int().numpy(), wanted, atol=2)


def test_of_a_run_the_model_the_knobs_and_the_validation_images_are_the_run_s(
    visualize, drawn, photos, tmp_path
):
    torch.manual_seed(1)
    model = create_model("evit_deit_tiny_patch16", num_classes=2, **SIZE)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    path = tmp_path / "run/checkpoints/best.ckpt"
    torch.save({f"model.{name}": weight for name, weight in model.state_dict().items()}, path)
    node = dict(_target_="evit.models.create_model", model_name="evit_deit_tiny_patch16")
    reducer = dict(_target_="evit.reducers.Drop", keep_rate=0.6, at=[1, 2])
    config = dict(
        model=node | SIZE | dict(reducer=reducer),
        data=dict(
            _target_="evit.data.Folder",
            root=str(photos),
            img_size=32,
            backend="imagefolder",
            num_workers=0,
        ),
        recipe=dict(crop_pct=0.9, max_val_images=2),
        **dict(keep_rate=0.6, fusion=False, img_size=32),
    )
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    visualize(f"checkpoint={path} num_images=5 target=a/kept.png")
    visualize(f"checkpoint={path} num_images=5 keep_rate=0.3 img_size=48 target=a/more.png")
    (drawn_model, _, pixels, *_), (again, _, larger, *_) = drawn
    assert len({image.numpy().tobytes() for image in pixels}) == 5
    assert drawn_model.drop_loc == (1, 2) and not drawn_model.fusion
    assert (drawn_model.keep_rate, again.keep_rate) == ((0.6, 0.6), (0.3, 0.3))
    assert (pixels.shape[-1], larger.shape[-1]) == (32, 48)
    torch.testing.assert_close(drawn_model.head.weight, model.head.weight, check_device=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model=evit_deit", "give the weights, one of checkpoint=PATH"),
        ("random=true", "model=NAME is needed"),
        (f"{RANDOM} num_images=0", "num_images must be at least 1, got 0"),
        (f"{RANDOM} target=kept.txt images=IMAGE", "unknown file extension: .txt"),
        (f"{RANDOM} crop_pct=2", "crop_pct must be from 0.01 to 1"),
        (f"{RANDOM} images=absent.jpg", "images=absent.jpg does not exist: give a folder"),
        (f"{RANDOM} images=[]", "images=[]: no file there opens as an image"),
        (f"{RANDOM} image=a.jpg", "did you mean images?"),
    ],
)
def test_what_cannot_be_drawn_is_said(visualize, photos, tmp_path, capfd, arguments, message):
    arguments = arguments.replace("IMAGE", f"{photos}/val/cat/0.jpg")
    with pytest.raises(SystemExit) as ended:
        visualize(arguments)
    assert ended.value.code == 2 and message in capfd.readouterr().err
    assert not list(tmp_path.glob("outputs/**/*"))
