"""Search the keep rates that lose least at a cost; write front.json and front.png."""

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig

from evit.commands import checkpoint
from evit.data.batch import normalize
from evit.files import telling
from evit.measure.search import Found, Search, gmacs
from evit.measure.speed import timed
from evit.report import results


@telling(lambda: "searching")
def run(cfg: DictConfig) -> None:
    """Search on one half of the images, report on the other; print the overrides to type next."""
    budgets = {k: cfg[k] for k in ("gmacs", "images_per_s", "accuracy") if cfg[k] is not None}
    if len(budgets) != 1 or cfg.images < 2:
        ways = "gmacs=3.0, images_per_s=1.5 (times the dense model's) or accuracy=-0.5 (points)"
        raise ValueError(f"give one budget: {ways}, and images=2 or more; got {budgets}")
    ((knob, value),) = budgets.items()
    model, about, cfg, _ = checkpoint.opened(cfg)
    reducer = getattr(model, "reducer", None)
    if reducer is None or reducer.masked or reducer.own or reducer.given:
        kind = type(model).__name__ if reducer is None else f"reducer {reducer.name}"
        raise ValueError(f"{kind} has no keep rates to search: take reducer=evit or another")
    places = range(1, len(model.blocks)) if cfg.places == "search" else reducer.at
    data = checkpoint.validation(cfg, cfg.images, cfg.images, ready=True)
    pixels, labels, *_ = next(iter(data.val_dataloader()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = normalize(pixels, about["mean"], about["std"]).to(device), labels.to(device)
    model.to(device)
    timing = partial(seconds, images=images[:: max(1, len(images) // 32)])
    unit, cost = ("s", timing) if knob == "images_per_s" else ("GMACs", gmacs)
    print(f"Searching {reducer.name} on {len(images[::2])} images of {data.name}", flush=True)
    search, held_out = (Search(model, images[i::2], labels[i::2], places, cost) for i in (0, 1))
    dense, most = search.dense, search.dense.cost
    limits = dict(gmacs=value, images_per_s=most / (value or 1), accuracy=most)
    if not 0 < (budget := limits[knob]) <= most:
        raise ValueError(f"{knob}={value} is no limit: the dense model takes {most:.4g} {unit}")
    search.uniform(budget)  # or it cannot be met
    search.sensitivities()
    front = search.front()  # from the cheapest
    accurate = (f for f in front if f.top1 >= dense.top1 + value)
    found = next(accurate, dense) if knob == "accuracy" else search.best(budget)
    uniforms = [u for f in front if (u := search.uniform(f.cost, or_none=True))]
    uniform = search.uniform(found.cost, or_none=True) or dense
    at, rates = search.keep_rates(found)
    rows, held = dict(dense=dense, uniform=uniform, found=found), dict[str, Any]()
    print(f"{len(search.known)} schedules measured\n")
    print(f"{'':8} {unit:>8}  KL: searched  held out  top-1")
    for name, row in rows.items():
        other: Any = held_out.measure(row.counts)
        held[name] = other._asdict()
        print(f"{name:8} {row.cost:8.4g} {row.loss:13.4f} {other.loss:9.4f}  {other.top1:5.2f}")
    line = f"reducer={reducer.name} reducer.at={at} keep_rate={rates}".replace(", ", ",")
    print(f"\nNext, with src/train.py, evaluate.py, benchmark.py or export.py:\n  {line}")
    result = dict(budget=budgets, unit=unit, reducer=reducer.name, overrides=line, at=at)
    result |= dict(keep_rate=rates, measured=len(search.known), checkpoint=str(cfg.checkpoint))
    for name, group in dict(front=front, uniform=uniforms, searched=rows.values()).items():
        result[name] = [row._asdict() for row in group]
    folder, result["held_out"] = Path(HydraConfig.get().runtime.output_dir), held
    results.write_json(result, folder / "front.json")
    draw(dict(searched=front, uniform=uniforms), found, unit, folder / "front.png")
    print(f"{folder}/front.json, front.png")


def seconds(model: Any, images: torch.Tensor) -> float:
    """Seconds per image, the median of 5 batches."""
    step = torch.no_grad()(partial(model, images))
    return median(timed(step, 1, images.device) for _ in range(5)) / len(images)


def draw(lines: dict[str, list[Found]], found: Found, unit: str, path: Path) -> None:
    figure = Figure(figsize=(5, 3.3), layout="constrained")
    axes = figure.add_subplot(xlabel=f"{unit} per image", ylabel="KL(dense || reduced)")
    axes.set_yscale("log")
    for (name, rows), marker in zip(lines.items(), "os", strict=True):
        rows = sorted((row for row in rows if row.loss > 0), key=lambda row: row.cost)
        axes.plot([r.cost for r in rows], [r.loss for r in rows], marker=marker, label=name)
    axes.plot([found.cost], [found.loss], "*", markersize=12, label="chosen")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=200)
