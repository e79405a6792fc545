"""Search keep rates that lose least at a cost; the loss is KL(dense || reduced) of predictions.
A dynamic program adds the losses of each place; what it proposes is measured and improved."""

import copy
import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evit.measure import count_macs
from evit.reducers.dynamicvit import divergence

BINS = 600  # resolution of the saved cost in the dynamic program


class Found(NamedTuple):  # a schedule
    counts: tuple[int, ...]  # image tokens after each place
    cost: float
    loss: float
    top1: float  # percent


def gmacs(model: Any) -> float:
    return count_macs(model) / 1e9


class Search:
    """Schedules of a model, whose reducer is replaced; `places` are the blocks that may reduce."""

    @torch.no_grad()
    def __init__(self, model: Any, images: Tensor, labels: Tensor, places, cost=gmacs, steps=10):
        self.model, self.labels, self.places, self.cost = model, labels, tuple(places), cost
        self.patches = n = model.patch_embed.num_patches
        self.grid = sorted({math.ceil(n * i / steps) for i in range(1, steps + 1)}, reverse=True)
        self.reducer, self.known = model.reducer, dict[tuple[int, ...], Found]()
        self.use([n] * len(self.places))
        x, self.trunk = model.embed(images), {}  # the tokens that enter each place
        for done, place in zip((0, *self.places), self.places, strict=False):
            x, _ = model.encode(x, done, place)
            self.trunk[place] = x
        self.logits = model.classify(x, self.places[-1])[0]
        self.dense: Any = self.measure([n] * len(self.places))

    def use(self, counts: Sequence[int]) -> None:
        """Set the token counts at the places; a ValueError if the reducer cannot leave these."""
        reducer, before = copy.deepcopy(self.reducer), [self.patches, *counts]
        changes = [i for i in range(len(counts)) if counts[i] != before[i]]
        reducer.at = tuple(self.places[i] for i in changes)
        reducer.given, reducer.own = [counts[i] for i in changes], False
        reducer.keep_rate = tuple(counts[i] / before[i] for i in changes)
        reducer.check(self.patches)
        self.model.reducer = reducer

    @torch.no_grad()
    def measure(self, counts: Sequence[int]) -> Found | None:
        """Measure a schedule, once; None if the reducer cannot leave these counts."""
        counts = tuple(counts)
        if counts not in self.known:
            try:
                self.use(counts)
            except ValueError:
                return None
            start = min(self.model.reducer.at, default=self.places[-1])
            logits = self.model.classify(self.trunk[start], start)[0]
            loss = divergence(logits, self.logits).mean().item()
            top1 = 100 * (logits.argmax(1) == self.labels).float().mean().item()
            self.known[counts] = Found(counts, self.cost(self.model), loss, top1)
        return self.known[counts]

    def uniform(self, budget: float, or_none: bool = False) -> Any:
        """Find the largest keep rate, equal at the reducer's places, within the budget."""
        fitting, low, high, n = None, 0.0, 1.0, self.patches
        for _ in range(9):
            reducer, rate, found = copy.deepcopy(self.reducer), (low + high) / 2, None
            with suppress(ValueError):  # the reducer cannot leave so few tokens
                reducer.set_keep_rate(rate)
                left = dict(zip(reducer.at, reducer.counts(n), strict=True))
                counts = np.minimum.accumulate([left.get(place, n) for place in self.places])
                found = self.measure(counts.tolist())
            if found is None or found.cost <= budget:
                low, fitting = rate, found or fitting
            else:
                high = rate
        if fitting is None and not or_none:
            raise ValueError(f"no keep rate of {self.reducer.name} gets down to {budget:.4g}")
        return fitting

    def sensitivities(self) -> None:
        """Measure each place alone at every token count, then solve the dynamic program once.

        A place is taken to add the difference to the loss and cost of the counts before it.
        """
        L, G = len(self.places), len(self.grid)
        loss, saved = np.full((L, G), np.inf), np.zeros((L, G))
        for i, g in product(range(L), range(G)):
            if found := self.measure([self.patches] * i + [self.grid[g]] * (L - i)):
                loss[i, g], saved[i, g] = found.loss, self.dense.cost - found.cost
        self.unit = max(saved.max() / BINS, 1e-12)
        losses = np.maximum.accumulate(loss, 1).tolist()  # fewer tokens are not better
        bins = np.round(saved / self.unit).astype(int).clip(0).tolist()
        # By index of the tokens left and bins saved: the least loss, and the schedule.
        self.least: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
        for lost, less in zip(losses, bins, strict=True):
            known, self.least = self.least, {}
            for (before, b), (total, counts) in known.items():
                for g in range(before, G):
                    key = g, b + max(less[g] - less[before], 0)
                    new = total + lost[g] - lost[before], (*counts, self.grid[g])
                    if lost[g] < np.inf and key[1] <= BINS:
                        self.least[key] = min(new, self.least.get(key, new))

    def path(self, bins: int) -> tuple[int, ...]:
        """Schedule of least predicted loss that saves at least this many bins; () if none."""
        fitting = (found for (_, saved), found in self.least.items() if saved >= bins)
        return min(fitting, default=(0.0, ()))[1]

    def front(self, count: int = 12) -> list[Found]:
        paths = {self.path(int(bins)) for bins in np.linspace(BINS, 0, count)} - {()}
        return sorted(filter(None, map(self.measure, paths)), key=lambda f: f.cost)

    def best(self, budget: float, moves: int = 60) -> Found:
        """Find the schedule of least loss within the budget, at least as good as uniform()."""
        best, wanted = self.uniform(budget), (self.dense.cost - budget) / self.unit
        paths = filter(None, map(self.path, range(max(0, math.floor(wanted)), BINS + 1, 6)))
        within = (found for found in map(self.measure, paths) if found and found.cost <= budget)
        best = min(best, next(within, best), key=lambda f: f.loss)
        step, limit, before = max(1, self.patches // 16), len(self.known) + moves, None
        while best != before:
            before = best
            for up, down in permutations(range(len(self.places)), 2):
                for lowered in range(1, 5):
                    counts = np.array(best.counts)
                    counts[[up, down]] += step, -lowered * step
                    counts = np.minimum.accumulate(counts.clip(1, self.patches))
                    found = self.measure(counts.tolist())
                    if len(self.known) >= limit:
                        return best
                    if found and found.cost <= budget:
                        best = min(best, found, key=lambda f: f.loss)
                        break
        return best

    def keep_rates(self, found: Found) -> tuple[list[int], list[float]]:
        """Places that reduce, and their keep rates with the fewest digits that give the counts."""
        self.use(found.counts)
        reducer, n, rates = self.model.reducer, self.patches, []
        for kept, left in zip(reducer.kept(n), reducer.given, strict=True):
            exact = (round((kept - 0.5) / n, digits) for digits in range(2, 9))
            rates.append(next(rate for rate in exact if math.ceil(rate * n) == kept))
            n = left
        return list(reducer.at), rates
