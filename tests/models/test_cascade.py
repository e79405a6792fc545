"""evit.Cascade: hard images get more tokens."""

import json

import pytest
import torch

import evit
from evit.models import create_model
from tests.reducers.tiny import images, reduced


@torch.no_grad()
def test_only_images_below_the_threshold_are_seen_again():
    model, x = reduced("evit", keep_rate=0.5), images(6)
    low = model(x)
    model.set_keep_rate(1.0)
    high = model(x)
    order = low.softmax(1).amax(1).sort().values
    cascade = evit.Cascade(model, [0.5, 1.0], (order[1] + order[2]).item() / 2)
    hard = low.softmax(1).amax(1)[:, None] <= order[1]
    torch.testing.assert_close(cascade(x), torch.where(hard, high, low), atol=1e-6, rtol=0)
    assert cascade.images == [6, 2]
    assert cascade.macs([1.0, 3.0]) == pytest.approx(1 + 3 * 2 / 6)


@torch.no_grad()
def test_a_threshold_of_0_is_the_first_rate_and_of_above_1_the_last():
    model, x = reduced("cover", keep_rate=0.5), images(3)
    rates = [0.5, [0.9, 0.8, 0.7], 1.0]
    for thresholds, step in (([0, 0], 0), ([2, 0], 1), ([2, 2], 2)):
        found = evit.Cascade(model, rates, thresholds)(x)
        model.set_keep_rate(rates[step])
        torch.testing.assert_close(found, model(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rates", "thresholds"), [([0.5], []), ([0.5, 1.0], [0.3, 0.4])])
def test_rates_and_thresholds_go_together(rates, thresholds):
    with pytest.raises(ValueError, match="two keep rates or more and a threshold between"):
        evit.Cascade(reduced("evit"), rates, thresholds)


COMMAND = (
    "model=evit_deit_tiny img_size=32 +model.embed_dim=48 +model.depth=4 +model.num_heads=3 "
    "+model.patch_size=4 data.root=PHOTOS batch_size=2 cascade=[0.5,1]"
)


@pytest.fixture
def evaluate(monkeypatch, tmp_path, photos):
    import evaluate

    monkeypatch.chdir(tmp_path)
    arguments = COMMAND.replace("PHOTOS", str(photos))
    sizes = dict(img_size=32, embed_dim=48, depth=4, num_heads=3, patch_size=4, num_classes=2)
    torch.save(create_model("evit_deit_tiny_patch16", **sizes).state_dict(), "model.pth")

    def run(more: str) -> None:
        monkeypatch.setattr(
            "sys.argv", ["evaluate.py", *arguments.split(), "checkpoint=model.pth", *more.split()]
        )
        evaluate.main()

    return run


def test_a_cascade_is_evaluated_beside_the_fixed_rate_of_its_cost(evaluate, tmp_path, capfd):
    evaluate("gmacs=0.008")
    (path,) = tmp_path.glob("outputs/evaluation/*/cascade.json")
    found, printed = json.loads(path.read_text()), capfd.readouterr().out
    assert found["cascade"]["images"] == found["fixed"]["images"] == 4  # 2 of 6 are calibrated on
    assert 0.5 <= found["threshold"] <= 1 and 0.5 < found["fixed_rate"] <= 1
    for name in ("cascade", "fixed"):
        assert f"{found[name]['top1']:.2f}" in printed and found[name]["images_per_s"] > 0
    assert found["fixed"]["gmacs"] == pytest.approx(0.008, rel=0.02)


@pytest.mark.parametrize("budget", ["", "gmacs=0.0001", "gmacs=1", "gmacs=[0.01,0.012]"])
def test_a_budget_that_no_cascade_has_is_refused(evaluate, capfd, budget):
    with pytest.raises(SystemExit):
        evaluate(budget)
    (line,) = capfd.readouterr().err.splitlines()
    assert "a cascade needs two keep rates and one budget of gmacs, from" in line
