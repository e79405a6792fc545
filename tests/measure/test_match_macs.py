"""A keep rate for a budget."""

import pytest
import torch

import evit
from evit.measure import count_macs, match_macs


def tiny(reducer: str) -> evit.EViT:
    with torch.device("meta"):
        size = dict(img_size=64, patch_size=4, embed_dim=48, depth=8, num_heads=3)
        return evit.EViT(**size, reducer=reducer)


@pytest.mark.parametrize("reducer", ["evit", "tome", "dynamicvit"])
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_it_is_the_largest_rate_within_the_budget(reducer, share):
    model = tiny(reducer)
    model.set_keep_rate(1.0)
    budget = share * count_macs(model) / 1e9
    rate = match_macs(model, budget)
    assert model.keep_rate == (rate,) * 3
    assert 0.98 * budget < count_macs(model) / 1e9 <= budget
    if rate < 1:
        model.set_keep_rate(rate + 1e-4)
        more = count_macs(model) / 1e9
        assert more > budget or model.reducer.kept(256) == tiny_kept(reducer, rate)


def tiny_kept(reducer: str, rate: float) -> list[int]:
    model = tiny(reducer)
    model.set_keep_rate(rate)
    return model.reducer.kept(256)


@pytest.mark.parametrize("gmacs", [0, -1, 99])
def test_a_budget_that_no_rate_has_is_named(gmacs):
    with pytest.raises(ValueError, match=f"gmacs must be from .* of evit, to .* got {gmacs}"):
        match_macs(tiny("evit"), gmacs)


def test_a_budget_below_what_the_reducer_can_do_is_named():
    with pytest.raises(ValueError, match="gmacs must be from 0.0.., the least of tome, to"):
        match_macs(tiny("tome"), 1e-3)
