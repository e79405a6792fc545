"""Keep rates chosen by measured loss and cost."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evit.measure.search import Search, gmacs
from tests.reducers.tiny import PATCHES, images, reduced


@pytest.fixture(params=["evit", "cover", "tome"])
def search(request):
    torch.manual_seed(1)
    model = reduced(request.param)
    found = Search(model, images(8), torch.zeros(8, dtype=torch.int64), (1, 2, 3), steps=6)
    found.sensitivities()
    return found


def test_the_program_finds_the_best_sum(search):
    """Of all schedules on the grid, none that saves as much has a smaller predicted loss."""
    n, places = search.patches, len(search.places)
    loss, saved = np.full((2, places, len(search.grid)), np.inf)
    for i, (g, tokens) in itertools.product(range(places), enumerate(search.grid)):
        if found := search.measure([n] * i + [tokens] * (places - i)):
            loss[i, g], saved[i, g] = found.loss, search.dense.cost - found.cost
    loss = np.maximum.accumulate(loss, 1)

    def add(values, chosen):
        before = (0, *chosen)
        with np.errstate(invalid="ignore"):
            return sum(values[i, g] - values[i, before[i]] for i, g in enumerate(chosen))

    every = list(itertools.combinations_with_replacement(range(len(search.grid)), places))
    for bins in (0, 100, 250, 400):
        counts = search.path(bins)
        assert list(counts) == sorted(counts, reverse=True)
        ours = add(loss, [search.grid.index(count) for count in counts])
        slack = places * search.unit  # what a schedule saves is rounded to bins at each place
        fitting = [c for c in every if add(saved, c) >= bins * search.unit + slack]
        assert ours <= min(x for c in fitting if np.isfinite(x := add(loss, c))) + 1e-9


def test_it_is_never_worse_than_the_uniform_rate_and_within_the_budget(search):
    for share in (0.9, 0.8):
        budget = share * search.dense.cost
        found, uniform = search.best(budget, moves=10), search.uniform(budget)
        assert found.cost <= budget and uniform.cost <= budget
        assert found.loss <= uniform.loss


def test_the_keep_rates_printed_give_the_counts_found(search):
    for found in search.front(5):
        at, rates = search.keep_rates(found)
        again = reduced(search.reducer.name, keep_rate=rates or 1.0, at=at or (1,), counts=None)
        assert gmacs(again) == pytest.approx(found.cost)


def test_200_settings_cost_at_most_20_evaluations():
    """Searched on a tenth of the images; what all settings share is computed once."""
    model = reduced("evit")
    with FlopCounterMode(display=False) as evaluation, torch.no_grad():
        model.set_keep_rate(1.0)
        model(images(20))
    calls = FlopCounterMode(display=False)
    with calls:
        search = Search(model, images(2), torch.zeros(2, dtype=torch.int64), (1, 2, 3), lambda _: 1)
        search.sensitivities()
        for counts in itertools.combinations_with_replacement(range(PATCHES, 1, -3), 3):
            if len(search.known) < 200:
                search.measure(counts)
    assert len(search.known) == 200
    assert calls.get_total_flops() <= 20 * evaluation.get_total_flops()


def test_a_budget_out_of_reach_is_told(search):
    with pytest.raises(ValueError, match=f"no keep rate of {search.reducer.name} gets down to"):
        search.uniform(search.dense.cost / 1000)


def test_the_counts_tried_are_tenths_of_the_patches_rounded_up():
    grid = Search(reduced("evit"), images(2), torch.zeros(2), (1, 2, 3)).grid
    assert grid == sorted({-(-PATCHES * i // 10) for i in range(1, 11)}, reverse=True)


def test_top1_is_the_share_of_right_answers():
    model, pixels = reduced("evit", keep_rate=1.0), images(8)
    with torch.no_grad():
        labels = model(pixels).argmax(1)
    labels[:2] += 1
    assert Search(model, pixels, labels, (1, 2, 3)).dense.top1 == 75


def test_no_small_move_from_what_is_found_is_better():
    """A move takes as many tokens as another place gets, up to four steps of a sixteenth."""
    search = Search(reduced("evit"), images(8), torch.zeros(8, dtype=torch.int64), (1, 2, 3))
    search.sensitivities()
    budget = 0.8 * search.dense.cost
    found, step = search.best(budget, moves=10_000), max(1, PATCHES // 16)
    for up, down in itertools.permutations(range(3), 2):
        counts = np.array(found.counts)
        counts[[up, down]] += step, -step
        other = search.measure(np.minimum.accumulate(counts.clip(1, PATCHES)).tolist())
        assert not other or other.cost > budget or other.loss >= found.loss
