"""evit.Cascade: hard images get more tokens."""

import pytest
import torch

import evit
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
