"""The numbers of one setting, and the dense model that it is compared with."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

SCRATCH, TUNED, SHELF = "from scratch", "fine-tuned", "off the shelf"


@dataclass(frozen=True)
class Point:
    """The numbers of one setting: a published row, or the mean over our runs of it.

    top1 and top5 are percent, macs 1e9 of an image, speed that of the dense model at the base size
    times. None: not published, not measured.
    """

    model: str  # a key of TIMM, or conf/model's
    rate: float | tuple[float, ...]
    fusion: bool | None
    img_size: int
    start: str = SCRATCH
    epochs: int | None = None
    top1: float | None = None
    top5: float | None = None
    macs: float | None = None
    images_per_s: float | None = None
    speed: float | None = None
    spread: float | None = None  # standard deviation of top1 over the runs
    runs: int = 1
    setting: str = ""  # of runs: tables.setting
    recipe: str = ""  # of runs: tables.training
    recipe_name: str = ""  # where points differ in it
    origin: str = ""  # what was fine-tuned, or evaluated: a setting, or the SHA-256 of a checkpoint

    @property
    def dense(self) -> bool:
        return self.rate == 1

    @property
    def top1_text(self) -> str:
        text = f"{self.top1:.2f}"
        return text if self.spread is None else f"{text} ± {self.spread:.2f}"

    @property
    def rest(self) -> str:
        """What becomes of the tokens that are not kept."""
        if self.dense or self.model.startswith("dynamicvit"):
            return ""
        return {True: "fused", False: "dropped", None: ""}[self.fusion]


def dense_of(point: Point, points: Sequence[Point]) -> Point | None:
    """The dense model that a setting is compared with, of those at hand; the mean over its seeds.

    It was trained by the same recipe: as long, on as many images of the same size. A fine-tuned one
    may also be compared with what it began with, and one off the shelf with that alone.
    """
    dense = [p for p in points if p.dense and p.top1 is not None and base(p) == base(point)]
    alike = [p for p in dense if trained(p) == trained(point)]
    began = [p for p in dense if point.start == TUNED and point.origin in (p.setting, p.origin)]
    return max(alike or began * bool(point.origin), key=lambda p: p.runs, default=None)


def trained(point: Point) -> tuple[Any, ...]:
    return point.start, point.origin, point.recipe, point.img_size


def base(point: Point) -> str:
    return re.sub("^(evit|dynamicvit)_", "", point.model)


def told_apart(points: list[Point], folders: dict[str, str]) -> list[Point]:
    """Points with names for their recipes, where several would look the same.

    Args:
        folders: of each setting, where its runs lie, which names a recipe if no other lies there.
    """
    recipes: dict[Any, dict[str, str]] = {}
    for p in points:
        recipes.setdefault(kind(p), {})[p.recipe] = folders.get(p.setting, "")
    named = []
    for p in points:
        others = recipes[kind(p)]
        unique = list(others.values()).count(others[p.recipe]) == 1
        name = others[p.recipe] if unique else p.recipe[:8]
        named.append(replace(p, recipe_name=name) if len(others) > 1 else p)
    return named


def kind(point: Point) -> tuple[Any, ...]:
    model = point.model if point.start == TUNED else base(point)
    return model, point.start, point.epochs, point.img_size
