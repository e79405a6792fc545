"""src/export.py, run as a user runs it."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from evit.commands import use as command
from evit.models import create_model
from evit.models.registry import reduced
from tests.test_predict import sent

TINY = "img_size=32 +model.embed_dim=48 +model.depth=4 +model.num_heads=3"
SIZE = dict(img_size=32, embed_dim=48, depth=4, num_heads=3)


@pytest.fixture
def export(monkeypatch, tmp_path, capfd):
    """Run src/export.py in this process; the file that it wrote, and what was printed."""
    import export

    monkeypatch.chdir(tmp_path)

    def run(arguments: str) -> tuple[Path, str]:
        monkeypatch.setattr(sys, "argv", ["export.py", *arguments.split()])
        export.main()
        (path,) = tmp_path.glob("outputs/export/*")
        return path, capfd.readouterr().out

    return run


@pytest.fixture
def refused(export, tmp_path, capfd):
    """Run src/export.py, which fails and leaves nothing; its message."""

    def run(arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            export(arguments)
        assert ended.value.code == 2 and not list(tmp_path.glob("**/*.onnx"))
        return capfd.readouterr().err

    return run


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def by_onnx(path: Path, batch: int) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images(batch).numpy()})[0]


MODELS = {
    "model=evit_deit_tiny keep_rate=0.7": ("evit_deit_tiny_patch16", dict(keep_rate=0.7)),
    "model=evit_deit_tiny keep_rate=[0.9,0.8,0.5] fusion=false": (
        "evit_deit_tiny_patch16",
        dict(keep_rate=[0.9, 0.8, 0.5], fusion=False),
    ),
    "model=evit_lvvit keep_rate=0.5": ("evit_lvvit_s", dict(keep_rate=0.5)),
    "model=deit": ("evit_deit_small_patch16", dict(keep_rate=1.0)),
    "model=evit_deit_tiny reducer=merge keep_rate=0.6": (
        "evit_deit_tiny_patch16",
        dict(reducer="merge", keep_rate=0.6),
    ),
    "model=evit_deit_tiny reducer=tome reducer.r=1": (
        "evit_deit_tiny_patch16",
        dict(reducer="tome", r=1),
    ),
    "model=dynamicvit_deit keep_rate=0.7": ("dynamicvit_deit_small_patch16", dict(keep_rate=0.7)),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [pytest.param(m, marks=pytest.mark.slow if i % 4 else ()) for i, m in enumerate(MODELS)],
)
def test_the_onnx_file_computes_what_the_model_computes(arguments, export, tmp_path):
    name, options = MODELS[arguments]
    torch.manual_seed(1)
    model = create_model(name, num_classes=5, **options, **SIZE).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    path, printed = export(f"{arguments} {TINY} checkpoint={tmp_path}/weights.pth")
    assert "Compared with PyTorch at batch sizes 1, 2, 5" in printed
    for batch in (1, 4):
        expected = model(images(batch)).numpy()
        np.testing.assert_allclose(by_onnx(path, batch), expected, atol=1e-4)


@torch.no_grad()
def test_any_timm_vit_as_a_torch_export_file(export, tmp_path):
    torch.manual_seed(1)
    model = reduced("vit_tiny_patch16_224", keep_rate=0.5, num_classes=5, **SIZE).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    arguments = f"model=timm_vit model.model_name=vit_tiny_patch16_224 {TINY} keep_rate=0.5"
    path, _ = export(f"{arguments} format=torch_export checkpoint={tmp_path}/weights.pth")
    extra = {"about.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    torch.testing.assert_close(program(images(4)), model(images(4)))
    about = json.loads(extra["about.json"])
    assert (about["keep_rate"], about["mean"]) == ([0.5] * 3, [0.5] * 3)


@torch.no_grad()
def test_of_a_run_the_model_and_the_knobs_that_are_not_given_are_the_run_s(export, tmp_path):
    torch.manual_seed(1)
    options = dict(keep_rate=0.6, fusion=False, drop_loc=[1, 2])
    model = create_model("evit_deit_tiny_patch16", num_classes=5, **SIZE, **options).eval()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    path = tmp_path / "run/checkpoints/best.ckpt"
    torch.save({f"model.{name}": weight for name, weight in model.state_dict().items()}, path)
    node = dict(_target_="evit.models.create_model", model_name="evit_deit_tiny_patch16")
    node |= SIZE | dict(reducer=dict(_target_="evit.reducers.EViT", at=[1, 2], fusion=False))
    node["reducer"]["keep_rate"] = 0.6
    config = dict(model=node, keep_rate=0.6, fusion=False, img_size=32, recipe={})
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    exported, printed = export(f"checkpoint={path}")
    np.testing.assert_allclose(by_onnx(exported, 2), model(images(2)).numpy(), atol=1e-4)
    assert exported.match("evit_deit_tiny_patch16-evit-0.6-32-????????.onnx")
    assert "evit, keep rate 0.6, 32 px" in printed
    facts = {p.key: json.loads(p.value) for p in onnx.load(exported).metadata_props}
    assert (facts["num_classes"], facts["fusion"]) == (5, False)


def test_class_names_and_normalisation_of_a_run_go_with_the_file(export, tmp_path, monkeypatch):
    facts: dict = {}

    def write(model, about, path):
        facts.update(about)
        path.touch()
        return lambda images: model(images).numpy()

    monkeypatch.setitem(command.FORMATS, "onnx", (".onnx", write))
    export(f"checkpoint={sent(tmp_path / 'sent.ckpt')}")
    assert (facts["classes"], facts["mean"], facts["std"]) == (["cat", "dog"], [0.5] * 3, [0.2] * 3)
    assert (facts["reducer"], facts["keep_rate"], facts["img_size"]) == ("merge", [0.6] * 3, 28)


def test_a_file_that_computes_something_else_is_not_left(monkeypatch, export, tmp_path):
    write = command.write_pt2

    def wrong(model, about, path) -> None:
        model.head.bias += 1
        compute = write(model, about, path)
        model.head.bias -= 1
        return compute

    monkeypatch.setitem(command.FORMATS, "torch_export", (".pt2", wrong))
    with pytest.raises(RuntimeError, match="at batch size 1 the exported logits differ by 1.0e.00"):
        export(f"model=evit_deit_tiny {TINY} random=true format=torch_export")
    assert not list(tmp_path.glob("outputs/export/*"))


def test_random_weights_are_named(export):
    path, printed = export(f"model=evit_deit_tiny {TINY} random=true format=torch_export")
    assert path.match("evit_deit_tiny-evit-0.7-32-????????.pt2")
    assert printed.startswith("Exporting evit_deit_tiny, random weights, keep rate 0.7, 32 px")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("model=evit_deit", "give the weights, one of checkpoint=PATH, pretrained=true"),
        ("model=evit_deit random=true pretrained=true", "give the weights, one of"),
        ("random=true", "model=NAME is needed"),
        ("model=evit_deit random=true format=tflite", "format must be onnx or torch_export"),
        ("model=evit_deit random=true target=a.pt", "ends in .onnx"),
        ("model=evit_deit random=true keep_rate=0", "keep_rate must be in"),
        ("model=evit_deit checkpoint=absent.ckpt", "'absent.ckpt' does not exist"),
    ],
)
def test_what_cannot_be_exported_is_said(refused, arguments, message):
    assert message in refused(arguments)


def test_a_package_that_is_missing_is_named(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    message = refused(f"model=evit_deit_tiny {TINY} random=true")
    assert "onnxscript is not installed: pip install" in message
