"""src/search.py, run as a user runs it."""

import json
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from evit import measure
from evit.commands import register
from evit.config import CONF_DIR

RANDOM = (
    "model=evit_deit_tiny random=true img_size=32 +model.embed_dim=48 +model.depth=4 "
    "+model.num_heads=3 +model.patch_size=4 data.root=PHOTOS images=6"
)
WAYS = ["gmacs=0.008", "accuracy=-100 places=search", "images_per_s=1.1 reducer=cover"]


@pytest.fixture
def search(monkeypatch, tmp_path, photos):
    import search

    monkeypatch.chdir(tmp_path)

    def run(arguments: str) -> None:
        arguments = f"{RANDOM} {arguments}".replace("PHOTOS", str(photos))
        monkeypatch.setattr(sys, "argv", ["search.py", *arguments.split()])
        search.main()

    return run


@pytest.mark.parametrize("budget", WAYS)
def test_what_is_found_is_what_the_printed_line_gives(search, tmp_path, capfd, monkeypatch, budget):
    from evit.commands import search as command

    def steady(model, images, real=command.seconds):  # a busy machine's times are no order
        assert real(model, images) > 0
        return measure.count_macs(model) / 1e9

    monkeypatch.setattr(command, "seconds", steady)
    search(budget)
    (path,) = tmp_path.glob("outputs/search/*/front.json")
    front, printed = json.loads(path.read_text()), capfd.readouterr().out
    assert front["overrides"] in printed and (path.parent / "front.png").is_file()
    costs = [row["cost"] for row in front["front"]]
    assert costs == sorted(costs) and len(costs) > 1
    dense, _, found = front["searched"]
    assert front["held_out"]["dense"]["loss"] == pytest.approx(0, abs=1e-6)
    assert found["cost"] <= dense["cost"]
    if "gmacs" in budget:
        assert found["cost"] <= 0.008
        assert found["loss"] <= front["searched"][1]["loss"]
    register()
    model = RANDOM.split(" data.root")[0].replace("random=true ", "").split()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", [*model, *front["overrides"].split()])
    again = instantiate(cfg.model, _convert_="all")
    assert measure.count_macs(again) / 1e9 == pytest.approx(found["cost"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give one budget: gmacs=3.0"),
        ("gmacs=1 accuracy=-1", "give one budget: gmacs=3.0"),
        ("gmacs=9", "is no limit: the dense model takes"),
        ("gmacs=0.0001", "no keep rate of evit gets down to 0.0001"),
        ("gmacs=0.008 images=1", "images=2 or more"),
        ("gmacs=0.008 reducer=dynamicvit", "reducer dynamicvit has no keep rates to search"),
        ("gmacs=0.008 reducer=tome reducer.r=2", "reducer tome has no keep rates to search"),
        ("gmacs=0.008 gmac=3", "gmac"),
    ],
)
def test_what_cannot_be_searched_is_said(search, capfd, arguments, message):
    with pytest.raises(SystemExit) as ended:
        search(arguments)
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()[-1:]
    assert message in line
