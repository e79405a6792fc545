"""Multiply-accumulates of reduced models: with the rate, and as published."""

import pytest
import timm
import torch

import evit
from evit.reducers import REDUCERS
from tests.reducers.tiny import PATCHES, images, reduced, run

NAMES = sorted(REDUCERS)
every = pytest.mark.parametrize("name", NAMES)


@every
@torch.no_grad()
def test_the_rate_moves_and_macs_with_it(name):
    model, x, macs = reduced(name, keep_rate=1.0), images(), []
    for rate in (1.0, 0.8, 0.6):
        model.set_keep_rate(rate)
        assert run(model, x).shape == (2, 7)
        counts = [evit.measure.count_macs(model, executed=executed) for executed in (False, True)]
        macs.append((model.tokens_per_block()[-1], *counts))
    if name == "mctf":  # merging the attention matrix costs these tiny blocks more than it saves
        macs = macs[1:]
    assert all(list(way) == sorted(set(way), reverse=True) for way in zip(*macs, strict=True))
    model.set_keep_rate(1)
    assert model.tokens_per_block() == [PATCHES] * 5


N, K, C, H, T = 64, 40, 48, 3, 65
SIMILARITIES = N * N // 4 * C  # of one half of the tokens to the other
PREDICTOR = N * (13 * C * C // 8 + 2 * C)
SQUEEZED = (N - K) * (K + 1) * C
# Products of a reduction from N to K tokens of C channels in H heads: scores, similarities, sums.
OWN = {
    "evit": N + (N - K) * C,
    "drop": N,
    "topk": N,
    "random": N,
    "ats": N * C + N * K,
    "merge": (N - K) * K * C + N * C,
    "diffrate": (N - K) * K * C + N * C,
    "cover": N * N * C + N * K * C,
    "tome": SIMILARITIES // H + N * C,
    "pitome": N * N * C // H + N * C,
    # One step ahead, its values and its attention are of the tokens that are left alone.
    "mctf": SIMILARITIES - 2 * (N - K) * C * C - (T**2 - (K + 1) ** 2) * C,
    "dynamicvit": PREDICTOR,
    "squeeze": N + SQUEEZED,
    "squeeze score": PREDICTOR + SQUEEZED,
}


@pytest.mark.parametrize("case", OWN)
def test_a_reduction_itself_costs_its_own_products(case):
    name, *option = case.split()
    reducer = reduced(name, **dict.fromkeys(option, "predictor")).reducer
    assert reducer.macs(N, K, C) == OWN[case] and {c.split()[0] for c in OWN} == {*NAMES}


SMALL = {  # 1e9 multiply-accumulates of DeiT-S by reducers' own ways to say it, as published
    "drop": (dict(keep_rate=0.7), 2.997),
    "merge": (dict(keep_rate=0.7), 2.997),
    "squeeze": (dict(keep_rate=0.7), 2.997),
    "cover": (dict(keep_rate=0.7), 3.06),
    "tome": (dict(r=13), 2.70),
    "tome, less": (dict(r=8), 3.42),
    "pitome": (dict(ratio=0.925), 2.99),
    "diffrate": (
        dict(
            prune_counts=[197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3],
            merge_counts=[197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3],
        ),
        2.905,
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_published_macs(case):
    options, gmacs = SMALL[case]
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
        evit.reduce(model, case.split(",")[0], **options)
    assert evit.measure.count_macs(model) / 1e9 == pytest.approx(gmacs, rel=0.01)
