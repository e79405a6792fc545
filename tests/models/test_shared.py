"""A reduced model is shared as timm's are: its folder makes the same model again."""

import json

import pytest
import timm
import torch
from timm.models import save_for_hf

import evit
from evit.reducers import REDUCERS

OPTIONS = dict(
    evit=dict(fusion=False, keep_rate=[0.9, 0.7, 0.5]),
    cover=dict(attention_power=0.5, counts=[12, 6, 3], at=(1, 2, 3)),
    tome=dict(r=2),
    pitome=dict(ratio=0.9),
    mctf=dict(tau_sim=0.5, at=(1, 2)),
    diffrate=dict(prune_counts=[14] * 4, merge_counts=[10] * 4),
    squeeze=dict(score="predictor"),
)


def base(name="vit_tiny_patch16_224"):
    return timm.create_model(name, depth=4, img_size=64, num_classes=5)


@pytest.mark.parametrize("name", sorted(REDUCERS))
@torch.no_grad()
def test_a_reduced_timm_model_comes_back_reduced(name, tmp_path):
    model = evit.reduce(base(), name, **OPTIONS.get(name, {})).eval()
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert repr(again.reducer) == repr(model.reducer)
    images = torch.randn(2, 3, 64, 64)
    if name != "random":
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("name", ["evit_deit_tiny_patch16", "evit_lvvit_t"])
def test_a_registered_model_comes_back_at_the_rate_it_was_set_to(name, tmp_path):
    model = timm.create_model(name, depth=4, img_size=64, keep_rate=0.9)
    model.set_keep_rate(0.5)
    model.reducer.fusion = False
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (again.keep_rate, again.fusion) == ((0.5,) * 3, False)


def test_a_reducer_from_elsewhere_is_named_and_not_replaced(tmp_path):
    class Mine(evit.reducers.Random):
        name = "mine"

    save_for_hf(evit.reduce(base(), Mine()), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["reducer"] == "mine"
    with pytest.raises(ValueError, match="reducer 'mine' does not exist"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_model_prints_its_reducer_with_rates_places_and_options():
    printed = str(evit.reduce(base(), "cover", 0.5))
    assert "Cover(at=(1, 2, 3), keep_rate=(0.5, 0.5, 0.5), attention_power=0.25" in printed
