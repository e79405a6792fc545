"""The keep rate over training, against the values of the published schedule."""

import pytest

import evit
from evit.reducers import keep_rate_at

STEPS = 625  # per epoch: ImageNet in batches of 2048


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 1.0), (9, 1.0), (10, 1.0), (35, 0.956), (60, 0.850), (85, 0.744), (100, 0.707)]
    + [(110, 0.7), (299, 0.7)],
)
def test_published_values(epoch, rate):
    assert keep_rate_at(epoch * STEPS, STEPS, [0.7], 10, 100) == pytest.approx((rate,), abs=5e-4)


def test_moves_at_every_step_of_the_annealing():
    rates = [keep_rate_at(step, STEPS, [0.7], 10, 100)[0] for step in range(20 * STEPS, 21 * STEPS)]
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))


def test_without_annealing_the_rate_is_final_from_the_first_step():
    assert keep_rate_at(0, STEPS, [0.7], 0, 0) == (0.7,)


def test_each_reorganization_moves_to_its_own_rate():
    halfway = keep_rate_at(60 * STEPS, STEPS, [0.8, 0.6, 1.0], 10, 100)
    assert halfway == pytest.approx((0.9, 0.8, 1.0))


@pytest.mark.parametrize("fusion", [True, False])
def test_at_multiples_the_tokens_of_an_image_are_multiples_and_not_fewer(fusion):
    model = evit.EViT(embed_dim=24, depth=4, num_heads=2, num_classes=2, fusion=fusion)
    seen = set()
    for percent in range(50, 100):
        model.set_keep_rate(percent / 100)
        exact = model.reducer.kept(196)
        model.reducer.multiple = 8
        rounded = model.reducer.kept(196)
        assert all(r >= e for r, e in zip(rounded, exact, strict=True))
        tokens = [n + 1 for n in model.tokens_per_block()]
        assert all(n % 8 == 0 or n == 197 for n in tokens)
        seen.add(tuple(tokens))
        model.reducer.multiple = 1
    assert len(seen) < 30
