"""The example of docs/reducers.md, as written there."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

import evit
from tests.conftest import QUICK, ROOT
from tests.reducers.tiny import images, vit

PAGE = (Path(__file__).parents[2] / "docs/reducers.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.S)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The folder of the example, with its two files."""
    code = [text for language, text in BLOCKS if language == "python"][1]
    (knobs,) = (text for language, text in BLOCKS if language == "yaml")
    (tmp_path / "conf/reducer").mkdir(parents=True)
    (tmp_path / "longest.py").write_text(code)
    (tmp_path / "conf/reducer/longest.yaml").write_text(knobs)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("longest", None)


def test_the_example_reduces_compiles_and_counts(mine):
    from longest import Longest

    model = evit.reduce(vit(), Longest(keep_rate=0.5, power=2.0)).eval()
    assert model.tokens_per_block() == [64, 32, 16, 8, 8]
    logits, source = model(images(), return_source=True)
    assert set(source[0].tolist()) == set(range(1, 9))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), logits)
    assert evit.measure.count_macs(model) > 0


def test_the_yaml_names_the_class_and_its_options(mine):
    (knobs,) = (yaml.safe_load(text) for language, text in BLOCKS if language == "yaml")
    assert knobs == dict(_target_="longest.Longest", keep_rate="${keep_rate}", power=1.0)


def test_the_python_lines_run(monkeypatch):
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size: real(1, *size[1:]))
    exec([text for language, text in BLOCKS if language == "python"][0], {})


def test_every_method_is_in_the_table():
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert rows == set(evit.reducers.REDUCERS) - {"topk"}


@pytest.mark.slow
def test_every_command_takes_it(mine, tmp_path, monkeypatch, shared_photos):
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments):
        arguments = [script, "--config-dir", f"{mine}/conf", *arguments]
        monkeypatch.setattr(sys, "argv", arguments)
        importlib.import_module(script).main()

    options = [f"data.root={shared_photos}", "data.backend=imagefolder", "data.num_workers=0"]
    run("train", *QUICK, *options, "reducer=longest", "reducer.power=2", "logger=none")
    (folder,) = tmp_path.glob("outputs/dev/*")
    result = json.loads((folder / "result.json").read_text())
    assert result["model"]["reducer"] == "longest"
    assert result["config"]["reducer"]["power"] == 2
    source = f"checkpoint={folder}"
    run("evaluate", source, "reducer=[evit,longest]", "keep_rate=0.5", "trainer=cpu")
    (path,) = tmp_path.glob("outputs/evaluation/*/evaluation.json")
    rows = json.loads(path.read_text())["settings"]
    assert [row["reducer"] for row in rows] == ["evit", "longest"]
    small = "img_sizes=28 batch_sizes=1 repeats=1 min_seconds=0.001 device=cpu target=speed".split()
    run("benchmark", "models=evit_deit_micro", "reducer=[evit,longest]", "keep_rates=0.5", *small)
    rows = json.loads((tmp_path / "speed/benchmark.json").read_text())["rows"]
    assert [row["reducer"] for row in rows] == [None, None, "evit", "longest"]
    run("visualize", source, "target=kept.png", "num_images=2")
    run("export", source, "format=torch_export", "target=model.pt2")
    run("predict", source, f"images={shared_photos}/val")
    assert (tmp_path / "kept.png").is_file() and (tmp_path / "model.pt2").is_file()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results/reducers/conf/reducer").glob("*.yaml")), ids=lambda p: p.stem
)
def test_each_exchanged_part_of_cover_reduces(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "results/reducers"))
    node = OmegaConf.load(path)
    node.keep_rate = 0.6
    model = evit.reduce(vit(), instantiate(node))
    assert model.reducer.name == path.stem
    logits, source = model(images(), return_source=True)
    assert logits.isfinite().all() and source.min() >= 0
