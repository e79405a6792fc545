"""Many reducers of a model in one pass: the work, the numbers and the draws."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import evit
from evit import reducers
from evit.training.module import Evaluator, Setting, mix_seed, setting_of

RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
SIZE = dict(img_size=64, patch_size=8, embed_dim=48, depth=8, num_heads=2, num_classes=10)


def attached(model, name="evit", keep_rate=0.7, **options):
    return reducers.make(name, keep_rate=keep_rate, **options).attach(model)


def logits(model, chosen, images, seed=0, batch_idx=0):
    evaluator = Evaluator(model, chosen, 10, seed).eval()
    with torch.inference_mode():
        return list(evaluator.logits(images, batch_idx))


def alone(model, reducer, images):
    """Logits of the model's own forward, with the draws of an evaluation."""
    model.reducer = reducer
    torch.manual_seed(seed_of(setting_of(reducer)))
    with torch.inference_mode():
        return model(images)


def seed_of(setting):
    import zlib

    return mix_seed(0, 0, 0, zlib.crc32(repr(setting).encode()))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return evit.EViT(**SIZE).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_six_keep_rates_together_cost_at_most_three_quarters_of_six_alone():
    model = timm.create_model("evit_deit_small_patch16", num_classes=10)
    image, separate = torch.randn(1, 3, 224, 224), 0
    chosen = [attached(model, keep_rate=rate) for rate in RATES]
    for model.reducer in chosen:
        separate += evit.measure.count_macs(model, executed=True)
    with FlopCounterMode(display=False) as counter:
        logits(model, chosen, image)
    assert counter.get_total_flops() / 2 <= 0.75 * separate


@pytest.mark.parametrize("name", reducers.REDUCERS)
def test_sharing_the_first_blocks_changes_no_digit(name, images):
    """Of any reducer, beside others that begin elsewhere, below a model of its own parameters."""
    torch.manual_seed(0)
    model = evit.EViT(**SIZE, reducer=name).eval()
    own = model.reducer
    chosen = [own, attached(model, keep_rate=[1, 0.5, 0.5]), attached(model, "tome", at=[1, 3])]
    dense, *together = logits(model, chosen, images)
    for reducer, found in zip(chosen, together, strict=True):
        assert torch.equal(found, alone(model, reducer, images))
    assert torch.equal(dense, alone(model, attached(model, keep_rate=1.0), images))
    assert not torch.equal(together[0], dense)


def test_keep_rate_1_is_the_dense_model_and_is_named_so(tiny, images):
    dense, same, _ = logits(tiny, [attached(tiny, "merge", 1.0), attached(tiny)], images)
    assert torch.equal(dense, same)
    assert setting_of(attached(tiny, "merge", 1.0)) == Setting((1.0, 1.0, 1.0))
    assert setting_of(attached(tiny)) == Setting((0.7,) * 3, True, "attentive", "evit")


def test_random_draws_do_not_depend_on_the_other_settings_nor_their_order(tiny, images):
    half, most = (attached(tiny, "random", rate) for rate in (0.5, 0.8))
    _, first, second = logits(tiny, [half, most], images)
    _, again, before = logits(tiny, [most, half], images)
    _, single = logits(tiny, [half], images)
    assert torch.equal(first, before) and torch.equal(first, single)
    assert torch.equal(second, again)


def test_random_draws_differ_by_batch_and_by_seed(tiny, images):
    half = [attached(tiny, "random", 0.5)]
    (_, first), (_, batch), (_, seed) = (
        logits(tiny, half, images, **other) for other in ({}, dict(batch_idx=1), dict(seed=1))
    )
    assert not torch.equal(first, batch) and not torch.equal(first, seed)


def test_the_selections_keep_what_they_say(tiny, images):
    """Keeping the inattentive tokens keeps none of the half that is attended to most."""
    kept = {}
    for selection in ("attentive", "inattentive"):
        tiny.reducer = attached(tiny, "drop", [0.5, 1, 1], selection=selection)
        with torch.no_grad():
            _, (ids, *_) = tiny(images, return_kept=True)
        kept[selection] = [set(row.tolist()) for row in ids]
    for best, worst in zip(*kept.values(), strict=True):
        assert len(best) == len(worst) == 32 and not best & worst
