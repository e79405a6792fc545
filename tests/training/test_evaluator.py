"""Many settings of a model in one pass: the work, the draws, and which models can share it."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import evit
from evit.training.evaluator import Evaluator, Setting, can_share, has_choices

RATES = [Setting((rate,) * 3, True, "attentive") for rate in (1, 0.9, 0.8, 0.7, 0.6, 0.5)]


def logits(model, settings, images, seed=0, batch_idx=0, shared=True):
    evaluator = Evaluator(model, settings, 10, seed, shared).eval()
    with torch.inference_mode():
        return list(evaluator.logits(images, batch_idx))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    options = dict(img_size=64, patch_size=8, embed_dim=48, depth=8, num_heads=2, num_classes=10)
    return evit.EViT(**options).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_six_keep_rates_together_cost_at_most_three_quarters_of_six_alone():
    model = timm.create_model("evit_deit_small_patch16", num_classes=10)
    image, flops, separate = torch.randn(1, 3, 224, 224), [], 0
    for setting in RATES:
        setting.apply(model)
        separate += evit.measure.count_macs(model, executed=True)
    for shared in (True, False):
        with FlopCounterMode(display=False) as counter:
            logits(model, RATES, image, shared=shared)
        flops.append(counter.get_total_flops())
    assert flops[1] / 2 == separate
    assert flops[0] <= 0.75 * flops[1]


def test_sharing_changes_no_digit_of_dynamicvit(images):
    torch.manual_seed(0)
    options = dict(img_size=64, patch_size=8, embed_dim=48, depth=8, num_heads=2, num_classes=10)
    model, settings = evit.DynamicViT(**options), [Setting((rate,) * 3) for rate in (1, 0.7, 0.5)]
    together = logits(model, settings, images)
    alone = logits(model, settings, images, shared=False)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together[0], together[2])


@pytest.mark.parametrize("selection", ["attentive", "random", "inattentive"])
@pytest.mark.parametrize("fusion", [True, False])
def test_sharing_the_first_blocks_changes_no_digit(tiny, images, fusion, selection):
    settings = [Setting((r, 0.8, 0.9), fusion, selection) for r in (1, 0.6, 0.3)]
    together = logits(tiny, settings, images)
    alone = logits(tiny, settings, images, shared=False)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_random_draws_do_not_depend_on_the_other_settings_nor_their_order(tiny, images):
    half, most = (Setting((rate,) * 3, False, "random") for rate in (0.5, 0.8))
    first, second = logits(tiny, [half, most], images)
    again, before = logits(tiny, [most, half], images)
    (alone,) = logits(tiny, [half], images)
    assert torch.equal(first, before) and torch.equal(first, alone)
    assert torch.equal(second, again)


def test_random_draws_differ_by_batch_and_by_seed(tiny, images):
    half = [Setting((0.5,) * 3, False, "random")]
    (first,), (batch,), (seed,) = (
        logits(tiny, half, images, **other) for other in ({}, dict(batch_idx=1), dict(seed=1))
    )
    assert not torch.equal(first, batch) and not torch.equal(first, seed)


def test_the_selections_keep_what_they_say(tiny, images):
    """Keeping the inattentive tokens keeps none of the half that is attended to most."""
    tiny.set_keep_rate([0.5, 1, 1])
    kept = {}
    for selection in ("attentive", "inattentive"):
        Setting((0.5, 1, 1), False, selection).apply(tiny)
        with torch.no_grad():
            _, (ids, *_) = tiny(images, return_kept=True)
        kept[selection] = [set(row.tolist()) for row in ids]
    for best, worst in zip(*kept.values(), strict=True):
        assert len(best) == len(worst) == 32 and not best & worst


def test_a_model_with_a_forward_of_its_own_computes_all_of_it(tiny, images):
    class Doubling(evit.EViT):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Doubling(
        img_size=64, patch_size=8, embed_dim=48, depth=8, num_heads=2, num_classes=10
    ).eval()
    model.load_state_dict(tiny.state_dict())
    settings = [Setting((0.5,) * 3)]
    tiny.fusion, tiny.selection = True, "attentive"
    (own,), (base,) = logits(model, settings, images), logits(tiny, settings, images)
    assert torch.equal(own, 2 * base)


def test_which_models_share_and_have_a_choice():
    lvvit = timm.create_model("evit_lvvit_t", num_classes=2, img_size=32)
    distilled = evit.reorganize(timm.create_model("deit_tiny_distilled_patch16_224"))
    plain = timm.create_model("deit_tiny_patch16_224")
    options = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=2)
    models = (lvvit, distilled, evit.DynamicViT(**options), plain)
    assert [can_share(model) for model in models] == [True, True, True, False]
    assert [has_choices(model) for model in models] == [True, True, False, False]
