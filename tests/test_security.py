"""What others may hand us, checkpoints, runs, data and names, is read and never obeyed."""

import ast
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from evit.data import FashionMNIST
from evit.data import ffcv as beton
from evit.data.ffcv.write import write_beton
from evit.data.label_maps import read_label_map
from evit.models.weights import read_state_dict
from evit.report import results
from evit.training import callbacks
from evit.training.callbacks import WholeFiles
from tests.conftest import ROOT
from tests.data.build import module


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def as_numpy(content: object, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, weights=np.array([content], object))


WRITE = dict(
    zip=torch.save,
    legacy=lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    pickle=lambda content, path: path.write_bytes(pickle.dumps(content)),
    numpy=as_numpy,
)
CONTENT = dict(
    bare=lambda attack: attack,
    published=lambda attack: {"model": {"head.weight": torch.zeros(2), "evil": attack}},
    lightning=lambda attack: {
        "state_dict": {"model.head.weight": torch.zeros(2)},
        "global_step": 3,
        "optimizer_states": [{"state": attack}],
    },
)


def unfinished(path: Path) -> None:
    """Go on with an interrupted run of which this is the last checkpoint."""
    last = path.parent / "run/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    path.rename(last)
    with pytest.warns(UserWarning, match="last.ckpt' cannot be read"):
        callbacks.unfinished(path.parent / "run")


READ = dict(
    weights=read_state_dict,  # checkpoint= of every program, recipe.teacher=
    resume=lambda path: callbacks.given(str(path), path.parent / "run"),
    last=unfinished,
    label_map=lambda path: read_label_map(path, 10),
)


@pytest.mark.parametrize("read", READ.values(), ids=READ)
@pytest.mark.parametrize("content", CONTENT.values(), ids=CONTENT)
@pytest.mark.parametrize("write", WRITE.values(), ids=WRITE)
def test_nothing_that_a_file_of_weights_asks_for_is_done(write, content, read, tmp_path):
    write(content(Attack(tmp_path / "owned")), tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth.*read.*\(?.+|no checkpoint in .*run can be"):
        read(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("write", [WRITE["zip"], WRITE["legacy"]], ids=["zip", "legacy"])
def test_lightning_executes_nothing_either(write, tmp_path):
    write(CONTENT["lightning"](Attack(tmp_path / "owned")), tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        WholeFiles().load_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert not (tmp_path / "owned").exists()


def test_torchvision_s_old_files_of_fashion_mnist_are_not_executed(tmp_path):
    folder = tmp_path / "FashionMNIST/processed"
    folder.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save(Attack(tmp_path / "owned"), folder / name)
    with pytest.raises(pickle.UnpicklingError):
        module(FashionMNIST, cache_dir=tmp_path).dataset("train")
    assert not (tmp_path / "owned").exists()


def test_a_beton_of_a_field_of_its_own_is_refused(tmp_path):
    path, pixels = tmp_path / "train.beton", np.zeros((4, 4, 3), np.uint8)
    options = dict(classes=["a"], source="here", num_workers=1)
    write_beton(path, [(pixels, 0), (pixels, 0)], **options)
    whole = path.read_bytes()
    attack = pickle.dumps(Attack(tmp_path / "owned"))
    field = np.zeros(1, beton.FIELD)
    field["type_id"], field["name"][0, :5] = 255, list(b"label")
    field["arguments"][0, : len(attack)] = list(attack)
    end = beton.HEADER.itemsize + beton.layout()[0].nbytes
    start = end - beton.FIELD.itemsize
    path.write_bytes(whole[:start] + field.tobytes() + whole[end:])
    with pytest.raises(ValueError, match="train.beton: its fields are not exactly image and label"):
        beton.open_beton(path)
    path.write_bytes(whole)
    beton.sidecar_path(path).write_bytes(attack)
    with pytest.raises(ValueError, match="train.beton.json, cannot be used"):
        beton.open_beton(path)
    assert not (tmp_path / "owned").exists()


READERS = "torch torch.jit np numpy pickle cloudpickle dill joblib marshal shelve".split()
SAFE = {"weights_only": True, "allow_pickle": False}


def test_the_code_has_no_reader_that_executes():
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not {"load", "loads"} & {alias.name for alias in node.names}, path
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            where = f"{path}:{node.lineno}: {name}"
            assert name not in ("eval", "exec", "yaml.load", "os.system", "__import__"), where
            assert "shell" not in {keyword.arg for keyword in node.keywords}, where
            module, _, function = name.rpartition(".")
            if function.startswith("load") and module in READERS:
                given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert any(given.get(option) is value for option, value in SAFE.items()), where


TARGETS = ["os.system", "evit.report.results.os.system", "evit.models.pretrained.timm.create_model"]


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder with a configuration; the path of its checkpoint."""

    def write(**changes) -> Path:
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        config = {"recipe": {}, "model": {}, "data": {}, "keep_rate": 0.7} | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path / "checkpoints/best.ckpt"

    return write


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("nested", [False, True], ids=["direct", "nested"])
def test_a_run_s_configuration_calls_what_conf_names_alone(run_folder, target, nested):
    call = {"_target_": target}
    if nested:
        call = {"_target_": "evit.data.Folder", "root": [call]}
    with pytest.raises(ValueError, match=f"config.json is not .* asks to call {target}, not in"):
        results.run_config(run_folder(data=call))


@pytest.mark.parametrize("field", ["keep_rate", "model"])
def test_a_run_s_configuration_does_not_read_the_environment(run_folder, field):
    secret = "${oc.env:AWS_SECRET_ACCESS_KEY}"
    with pytest.raises(ValueError, match="config.json is not .* to be looked up"):
        results.run_config(run_folder(**{field: [secret] if field == "model" else secret}))


def test_a_run_s_configuration_loads_no_weights_of_its_own(run_folder):
    model = {"_target_": "evit.models.create_model", "checkpoint_path": "evil.pth"}
    with pytest.raises(ValueError, match="config.json is not .* load evil.pth"):
        results.run_config(run_folder(model=model))
