"""What the charts show, whatever draws them."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from evit.report import compare
from evit.report.compare import TITLES
from evit.report.found import Found
from evit.report.points import SCRATCH, SHELF, Point, base, dense_of

NAMES = dict(deit_s="DeiT-S", lvvit_s="LV-ViT-S", dynamicvit_deit_s="DynamicViT-DeiT-S")
TOP1 = "top-1 accuracy (%)"
MARKERS = dict(lvvit="triangle-up", dynamicvit="diamond")  # so that colour does not matter
SPARE = "triangle-down", "star", "triangle-left", "triangle-right", "diamond", "circle"
# A point of a series: the series' name, the point, whether it is ours, where it stands.
Entry = tuple[str, Point, bool, float | None, float | None]


@dataclass
class Series:
    """Points of one kind, or a line through them.

    family chooses the colour; ours are solid and the paper's hollow; marker is as plotly names it.
    """

    name: str
    family: str
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    hover: list[str] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)  # of y; 0: of one run
    template: str = ""  # instead of hover: of every point, as plotly fills it in
    ours: bool = True
    marker: str = "circle"
    faint: bool = False
    line: bool = True
    markers: bool = True


@dataclass
class View:
    """Series over one pair of axes."""

    name: str
    x_title: str
    y_title: str
    series: list[Series]
    log_x: bool = False


@dataclass
class Chart:
    id: str
    title: str
    note: str
    views: list[View]


def family(point: Point) -> str:
    if point.start == SHELF:
        return "shelf"
    if point.model.startswith("dynamicvit"):
        return "dynamicvit"
    return next((name for name in ("deit", "lvvit") if base(point).startswith(name)), "other")


def group(point: Point) -> str:
    """What a line of a chart goes through: settings that differ in keep rate alone."""
    parts = [NAMES.get(point.model, point.model), point.rest]
    if point.start != SCRATCH:
        parts.append(point.start)
    if point.epochs and point.epochs < 300:
        parts.append(f"{point.epochs} epoch" + "s" * (point.epochs > 1))
    return ", ".join(filter(None, [*parts, point.recipe_name]))


def label(point: Point, size: int = 224) -> str:
    rates = point.rate if isinstance(point.rate, tuple) else (point.rate,)
    text = "dense" if point.dense else ",".join(f"{rate:g}" for rate in rates)
    return text if point.img_size == size else f"{text} at {point.img_size}"


def hover(point: Point, name: str) -> str:
    """All numbers of a point, a line each."""
    lines = [name, f"keep rate {label(point)}, {point.img_size} px"]
    if point.top1 is not None:
        runs = f" (mean and standard deviation of {point.runs} runs)" if point.runs > 1 else ""
        lines.append(f"top-1 {point.top1_text} %{runs}")
    if point.top5 is not None:
        lines.append(f"top-5 {point.top5:.2f} %")
    if point.macs is not None:
        lines.append(f"{point.macs:.3g} GMACs per image")
    if point.images_per_s is not None:
        lines.append(f"{point.images_per_s:,.4g} images/s")
    if point.speed is not None:
        lines.append(f"{point.speed:.2f} times the dense model's")
    return "\n".join(lines)


def plot(entries: Iterable[Entry], sizes: bool = True) -> list[Series]:
    """Series of points in order of x, without those that have no x or y.

    Args:
        sizes: labels have the image size where it is not the paper's.
    """
    found: dict[tuple[str, bool], list[tuple[float, float, Point]]] = {}
    for name, point, own, x, y in entries:
        if x is not None and y is not None:
            found.setdefault((name, own), []).append((x, y, point))
    return [_series(*key, members, sizes) for key, members in found.items()]


def marked(series: list[Series]) -> list[Series]:
    """Give each line a marker that no other of its colour has; ours has that of its paper's line.

    The first of a family has the family's own, and of those that drop tokens a square.
    """
    taken: dict[tuple[str, bool], dict[str, str]] = {}
    for one in series:
        name = one.name.removesuffix(" (paper)")
        mine = taken.setdefault((one.family, one.ours), {})
        twin = taken.get((one.family, not one.ours), {}).get(name)
        wanted = [twin, one.marker, *SPARE]
        one.marker = next((m for m in wanted if m and m not in mine.values()), one.marker)
        mine[name] = one.marker
    return series


def _series(name: str, own: bool, members: list[tuple[float, float, Point]], sizes: bool) -> Series:
    members.sort(key=lambda member: member[0])
    xs, ys, points = (list(column) for column in zip(*members, strict=True))
    style = next((point for point in points if not point.dense), points[0])
    shown = name if own else f"{name} (paper)"
    return Series(
        shown,
        family(style),
        xs,
        ys,
        [label(point, 224 if sizes else point.img_size) for point in points],
        [hover(point, shown) for point in points],
        [point.spread or 0 for point in points],
        ours=own,
        marker="square" if style.rest == "dropped" else MARKERS.get(family(style), "circle"),
        line="resolution" not in name,  # those are points here and there
    )


def imagenet(found: Found) -> Chart:
    """Top-1 on ImageNet against what an image costs: the paper's rows, and ours where they ran."""
    lines: list[tuple[str, Point, bool]] = []
    ways = []
    for table in (name for name in TITLES if name != "off_the_shelf"):
        way, matched = compare.pairs(found, table)
        if way not in ways and any(own and own.top1 is not None for _, own in matched):
            ways.append(way)
        rests = sorted({row.rest for row, _ in matched} - {""}, reverse=True)
        trained = sorted({row.rest for row, own in matched if own and own.top1 is not None})
        for row, own in matched:
            names = [group(row)]
            if table.startswith("resolution"):
                names = [f"{NAMES[row.model]}, higher resolution"] * (row != matched[0][0])
            elif row.dense:  # the start of every line
                names = [f"{names[0]}, {rest}" for rest in rests]
                lines += [(f"{group(row)}, {rest}", own, True) for rest in trained if own and rest]
                own = None
            elif table == "dynamicvit_deit_s" and row.start == SCRATCH and row.model == "deit_s":
                names = []  # the main table has it
            lines += [(name, p, p is own) for name in names for p in (row, own) if p]
    device = "; ".join(filter(None, ways)) or "not measured"
    titles = dict(
        macs="GMACs per image",
        speed="images/s (times the dense model's at 224 px)",
        images_per_s=f"images/s (paper: GPU; ours: {device})",
    )
    views = [
        View(
            name,
            titles[cost],
            TOP1,
            marked(plot((*line, getattr(line[1], cost), line[1].top1) for line in lines)),
            log_x=cost != "speed",
        )
        for cost, name in dict(macs="GMACs", speed="speed-up", images_per_s="images/s").items()
    ]
    note = (
        "Hollow: published. Filled: ours, where runs on the whole of ImageNet have finished. "
        "Squares: the other tokens dropped; else fused. Labels: keep rate."
    )
    return Chart("imagenet", "ImageNet: accuracy against cost", note, views)


def references() -> list[Point]:
    """The paper's rows at 224 px; those off the shelf with the MACs that their models have."""
    published = compare.published()
    main = published["keep_rate_deit_s"]
    macs = {point.rate: point.macs for point in main if point.fusion is not False}
    shelf = [replace(point, macs=macs[point.rate]) for point in published["off_the_shelf"]]
    dynamic = [p for p in published["dynamicvit_deit_s"] if p.model.startswith("dynamicvit")]
    return [*main, *published["keep_rate_lvvit_s"], *shelf, *dynamic]


def changes(points: list[Point], own: bool, cost: str) -> list[Entry]:
    """Each point beside its dense model: cost in percent of it, top-1 in points from it."""
    groups: dict[tuple[str, Point], list[Point]] = {}
    for point in points:
        if not point.dense and (dense := dense_of(point, points)):
            groups.setdefault((group(point), dense), []).append(point)
    entries: list[Entry] = []
    for (name, dense), members in groups.items():
        assert dense.top1 is not None
        costs = getattr(dense, cost)
        for point in [dense, *members]:
            value = getattr(point, cost)
            x = 100 * value / costs if value is not None and costs else None
            y = None if point.top1 is None else point.top1 - dense.top1
            entries.append((name, point, own, x, y))
    return entries


def relative(index: int, points: list[Point]) -> Chart | None:
    """Change of top-1 against change of cost, each beside its own dense model; the paper's too."""
    y_title = "top-1, change to the dense model (points)"
    views = []
    for shelf, kind in (False, ""), (True, " off the shelf"):
        for name, cost in (("GMACs", "macs"), ("images/s", "images_per_s")):
            both = [
                plot(changes([p for p in given if (p.start == SHELF) == shelf], own, cost), False)
                for given, own in ((references(), False), (points, True))
            ]
            if any(len(series.x) > 1 for series in both[1]):
                title = f"{name} (% of the dense model's)"
                views.append(View(name + kind, title, y_title, marked(both[0] + both[1])))
    if not views:
        return None
    note = (
        "Every model beside its own dense model, so that runs on other data can stand beside the "
        "paper's on ImageNet (hollow). Labels: keep rate. Bars: standard deviation over seeds."
    )
    if not any("images/s" in view.name for view in views):
        note += " Images/s have not been measured for these models (src/benchmark.py)."
    elif any(point.images_per_s and point.speed is None for point in points):
        note += " Images/s are what the runs measured for a moment at their end, the median over "
        note += "seeds; src/benchmark.py lets models take turns."
    return Chart(
        f"relative-{index}",
        "Accuracy against cost, beside the dense model",
        note,
        views,
    )
