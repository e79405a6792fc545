"""Making label maps: dense logits of many kinds of models, the files, what is refused."""

import os
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import evit  # noqa: F401
from evit.commands.prepare import dense_logits, make_label_maps
from evit.data.label_maps import read_label_map
from tests.data.build import folder

CLASSES = [*"abcdef"]
SIZE = 64


def build(name, num_classes=6, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes, **options).eval()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two photos of 80 x 70 px in each of six classes."""
    root = tmp_path_factory.mktemp("six") / "photos"
    rng = np.random.default_rng(0)
    for split in "train", "val":
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for k in range(2):
                pixels = rng.integers(0, 256, (7, 8, 3), dtype=np.uint8)
                photo = Image.fromarray(pixels).resize((80, 70), Image.Resampling.BICUBIC)
                photo.save(root / split / name / f"{k}.jpg")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet.pth"
    torch.save(build("test_resnet").state_dict(), path)
    return path


def make(tree, target, checkpoint, **options):
    options = dict(model_name="test_resnet", img_size=SIZE, num_workers=0, batch_size=5) | options
    return make_label_maps(tree, target, checkpoint=checkpoint, **options)


SMALL_SWIN = dict(img_size=64, window_size=2, embed_dim=24, depths=(1, 1), num_heads=(1, 2))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_nfnet", {}),
        ("test_efficientnet", {}),
        ("swin_tiny_patch4_window7_224", SMALL_SWIN),
    ],
)
@torch.inference_mode()
def test_positions_of_an_average_pooled_classifier_average_to_its_output(name, options):
    model, images = build(name, **options), torch.randn(2, 3, 64, 64)
    logits = dense_logits(model, images)
    assert logits.shape[:2] == (2, 6) and logits.shape[2] * logits.shape[3] > 1
    assert logits.std((2, 3)).max() > 1e-6
    torch.testing.assert_close(logits.mean((2, 3)), model(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_mambaout"])
@torch.inference_mode()
def test_a_position_is_classified_as_an_image_of_nothing_else(name):
    """Also where the head normalises what it has pooled."""
    model, images = build(name), torch.randn(1, 3, 64, 96)
    logits, features = dense_logits(model, images), model.forward_features(images)
    assert logits.shape == (1, 6, 2, 3)
    channels_last = features.shape[3] == model.num_features
    for row in range(2):
        for column in range(3):
            one = features[:, row, column, :] if channels_last else features[:, :, row, column]
            whole = one.reshape(1, 1, 1, -1) if channels_last else one.reshape(1, -1, 1, 1)
            expected = model.forward_head(whole.expand(features.shape))
            torch.testing.assert_close(logits[:, :, row, column], expected)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224", "test_vit_relpos"])
@torch.inference_mode()
def test_a_vit_s_classifier_is_applied_to_its_patches(name):
    model = build(name, img_size=64)
    images = torch.randn(2, 3, 64, 64)
    patches = model.forward_features(images)[:, model.num_prefix_tokens :]
    if hasattr(model, "head_dist"):
        expected = (model.head(patches) + model.head_dist(patches)) / 2
    else:
        expected = model.head(model.fc_norm(patches))
    found = dense_logits(model, images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_lv_vit_has_a_classifier_for_its_patches():
    model, images = build("lvvit_t", img_size=64, depth=3), torch.randn(1, 3, 64, 64)
    expected = model.aux_head(model.forward_features(images)[:, 1:])
    torch.testing.assert_close(dense_logits(model, images).flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@torch.inference_mode()
def test_each_file_holds_the_top_5_of_what_is_shown(tree, checkpoint, tmp_path, crop_mode):
    model = build("test_resnet")
    cfg = model.pretrained_cfg
    make(tree, tmp_path / "maps", checkpoint, crop_mode=crop_mode)
    files = sorted(path.relative_to(tmp_path / "maps") for path in tmp_path.glob("maps/*/*"))
    assert [str(path) for path in files] == [f"{c}/{k}.pt" for c in CLASSES for k in range(2)]
    for path in files:
        with Image.open(tree / "train" / path.with_suffix(".jpg")) as image:
            # The short side, 70 px, becomes 64, the long one 73: 4 px go on the left.
            width, left = dict(center=(73, 4), squash=(64, 0))[crop_mode]
            resized = image.resize((width, 64), Image.Resampling[cfg["interpolation"].upper()])
        pixels = np.asarray(resized.crop((left, 0, left + 64, 64)), np.float32) / 255
        pixels = (pixels - np.float32(cfg["mean"])) / np.float32(cfg["std"])
        logits = dense_logits(model, torch.tensor(pixels).permute(2, 0, 1)[None])[0]
        found = read_label_map(tmp_path / "maps" / path, 6, (2, 2))
        values, ids = logits.topk(5, 0)
        torch.testing.assert_close(found[0], values.half(), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(
            logits.gather(0, found[1].long()), logits.gather(0, ids), atol=1e-3, rtol=1e-3
        )


def test_maps_that_are_there_are_kept_and_damaged_ones_made_again(tree, checkpoint, tmp_path):
    target = make(tree, tmp_path / "maps", checkpoint)
    paths = sorted(target.glob("*/*.pt"))
    before = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[3].unlink()
    paths[5].write_bytes(before[5][:100])
    os.utime(paths[7], ns=(0, 1))  # older than its image
    make(tree, target, checkpoint)
    assert [path.read_bytes() for path in paths] == before
    again = [path.stat().st_mtime_ns for path in paths]
    assert [i for i in range(12) if again[i] != times[i]] == [3, 5, 7]
    data = folder(tree, tmp_path / "cache", label_maps=target)
    assert next(iter(data.train_dataloader()))[2].shape[3:] == (2, 2)


def test_a_folder_of_other_maps_is_not_mixed(tree, checkpoint, tmp_path):
    target = make(tree, tmp_path / "maps", checkpoint)
    with pytest.raises(ValueError, match=r"holds label maps of .*\[64, 64\].*, not of .*\[96"):
        make(tree, target, checkpoint, img_size=96)


def test_the_interrupted_file_is_none(tree, checkpoint, tmp_path, monkeypatch):
    def interrupt(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tree, tmp_path / "maps", checkpoint)
    assert list(tmp_path.glob("maps/*/*.pt")) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(checkpoint=None, pretrained=False), "would have random weights"),
        (dict(model_name="test_resnet_of_mine"), "Unknown model"),
        (dict(model_name="test_vit"), "does not fit VisionTransformer"),
        (dict(checkpoint="none.pth"), "'none.pth' does not exist"),
        (dict(crop_mode="border"), "crop_mode=border"),
        (dict(crop_pct=1.5), "crop_pct=1.5"),
    ],
)
def test_what_cannot_serve_is_named(tree, checkpoint, tmp_path, options, reason):
    options = dict(checkpoint=checkpoint) | options
    with pytest.raises(ValueError, match=reason):
        make(tree, tmp_path / "maps", **options)
    assert not (tmp_path / "maps").exists()


def test_pretrained_for_other_classes_is_named(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "evit.commands.prepare.create_model", lambda name, _, **options: build(name, 1000)
    )
    with pytest.raises(ValueError, match="has 1000 classes and the images have 6"):
        make(tree, tmp_path / "maps", None, img_size=None)


def test_a_model_without_spatial_features_is_named(tree, tmp_path):
    torch.save(build("pit_ti_224").state_dict(), tmp_path / "pit.pth")
    with pytest.raises(ValueError, match="PoolingVisionTransformer keeps no grid of features"):
        make(tree, tmp_path / "maps", tmp_path / "pit.pth", model_name="pit_ti_224", img_size=None)


def test_the_command_makes_maps_that_training_reads(tree, checkpoint, tmp_path, monkeypatch, capfd):
    import label_maps

    def run(*more):
        arguments = [f"source={tree}", f"target={tmp_path}/maps", f"checkpoint={checkpoint}"]
        arguments += ["model_name=test_resnet", "img_size=96", "num_workers=0", *more]
        monkeypatch.setattr(sys, "argv", ["label_maps.py", *arguments])
        label_maps.main()
        return capfd.readouterr().out

    monkeypatch.chdir(tmp_path)
    shown = run()
    assert "12 images in 6 classes, 0 have their label maps already: test_resnet at 96" in shown
    assert "12 have their label maps already" in run()
    data = folder(tree, tmp_path / "cache", label_maps=tmp_path / "maps", batch_size=12)
    ((_, labels, found, _),) = data.train_dataloader()
    made = {
        read_label_map(path, 6, (3, 3)).numpy().tobytes(): CLASSES.index(path.parent.name)
        for path in (tmp_path / "maps").glob("*/*.pt")
    }
    assert {one.numpy().tobytes(): int(k) for one, k in zip(found, labels, strict=True)} == made
    with pytest.raises(SystemExit, match="2"):
        run("img_size=64")
    error = capfd.readouterr().err
    assert "choose another target" in error and "Traceback" not in error
