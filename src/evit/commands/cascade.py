"""Evaluate a cascade: all images at a low keep rate, the unsure ones again at a higher one."""

import time
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from evit import measure
from evit.commands import checkpoint
from evit.data.batch import normalize
from evit.files import telling
from evit.models.cascade import Cascade
from evit.report import markdown, results

EVERY = 10  # one batch in ten calibrates the threshold; it is not reported


@telling(lambda: "evaluating")
@torch.no_grad()
def run(cfg: DictConfig) -> dict[str, Any]:
    """Choose the threshold for a budget of gmacs on some batches; measure on the others.

    For comparison, the fixed keep rate of the same cost alternates with it, batch by batch.
    """
    rates, budget = [float(rate) for rate in cfg.cascade], cfg.gmacs
    model, about, cfg, source = checkpoint.opened(cfg)
    data = checkpoint.validation(cfg, cfg.batch_size, cfg.max_val_images, ready=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    costs = []
    for rate in rates:
        model.set_keep_rate(rate)
        costs.append(measure.count_macs(model) / 1e9)
    if len(rates) != 2 or not isinstance(budget, int | float) or not costs[0] < budget < sum(costs):
        text = f"from {costs[0]:.4g} to {sum(costs):.4g}, got cascade={rates} gmacs={budget}"
        raise ValueError(f"a cascade needs two keep rates and one budget of gmacs, {text}")
    fixed = measure.match_macs(model, min(budget, costs[1]))
    cost = measure.count_macs(model) / 1e9
    cascade, seen = Cascade(model.to(device), rates, 0.0), list[Any]()
    for i, (pixels, labels, *_) in enumerate(data.val_dataloader()):
        images = normalize(pixels, about["mean"], about["std"]).to(device)
        if i % EVERY == 0:
            model.set_keep_rate(rates[0])
            seen.append(model(images).softmax(1).amax(1))
            share = (budget - costs[0]) / costs[1]
            cascade.thresholds = [torch.cat(seen).quantile(share).item()]
            if i == 0:
                cascade(images)  # warm
                cascade.images, rows = [0, 0], dict(cascade=[0, 0.0, 0], fixed=[0, 0.0, 0])
            continue
        for name in ("cascade", "fixed") if i % 2 else ("fixed", "cascade"):
            if name == "fixed":
                model.set_keep_rate(fixed)
            started = time.perf_counter()
            logits = cascade(images) if name == "cascade" else model(images)
            right = (logits.argmax(1).cpu() == labels).sum().item()
            for column, value in enumerate((right, time.perf_counter() - started, len(labels))):
                rows[name][column] += value
    if not rows["fixed"][2]:
        raise ValueError(f"one batch of {cfg.batch_size} holds all images: lower batch_size")
    macs = dict(cascade=cascade.macs(costs), fixed=cost)
    found = {
        name: dict(top1=100 * right / n, gmacs=macs[name], images_per_s=n / seconds, images=n)
        for name, (right, seconds, n) in rows.items()
    }
    result = dict(rates=rates, threshold=cascade.thresholds[0], fixed_rate=fixed, **found)
    titles = dict(cascade=f"{rates[0]:g}, unsure ones {rates[1]:g}", fixed=f"{fixed:.3g} for all")
    lines = [
        {"keep rate": titles[name], "top-1": f"{row['top1']:.2f}"}
        | {"GMACs": f"{row['gmacs']:.4g}", "images/s": f"{row['images_per_s']:.0f}"}
        for name, row in found.items()
    ]
    print(markdown(lines) + f"\nUnsure: below {cascade.thresholds[0]:.3f}.")
    folder = Path(HydraConfig.get().runtime.output_dir)
    results.write_json(result | dict(checkpoint=str(source.path)), folder / "cascade.json")
    return result
