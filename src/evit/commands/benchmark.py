"""Time models that take turns, beside the dense model; write benchmark.json and tables."""

import logging
import os
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from evit.commands.benchmark_gpu import measure_all
from evit.config import listed, overridden
from evit.measure.entries import choose, facts
from evit.measure.speed import DTYPES, Group, contest
from evit.report import benchmark, paper, results

DEFAULTS: dict[bool, dict[str, Any]] = {  # by whether there is a GPU
    True: dict(batch_sizes=[1, 32, 256], precisions="bf16", compile=list(benchmark.MODES)),
    False: dict(batch_sizes=8, precisions="fp32", compile=False),
}
ROWS = {"models", "keep_rates", "fusion", "img_sizes", "reducers"}
CHOICES: dict[str, tuple[Any, ...]] = dict(
    device=("auto", "cpu", "cuda"),
    what=("inference", "training"),
    precisions=tuple(DTYPES),
    compile=tuple(benchmark.MODES),
    paper=(None, False, True, *paper.MODELS, "field", "gpu"),
)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure by a composed configuration; leave benchmark.json in Hydra's run folder.

    Raises:
        ValueError: the configuration cannot be served; nothing has been written.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    device = complete(config)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it looks for a GPU
    started = time.perf_counter()
    result: dict[str, Any] = dict(rows=[], matmul=[], left_out=[])
    if config["paper"] == "gpu":
        measure_all(result, config, device)
    else:
        entries = choose(config)
        for entry in sorted(entries, key=lambda entry: entry.dense):
            facts(entry)  # says what is wrong with a model
        names = ("what", "batch_sizes", "precisions", "compile")
        for values in product(*(config[name] for name in names)):
            group = Group(*values)
            print(f"{group}: {len(entries)} models", flush=True)
            contest(result, entries, group, device, config)
    result |= dict(config=config, device=results.device_name(device))
    result |= results.provenance() | dict(seconds=round(time.perf_counter() - started, 1))
    text = benchmark.markdown(result)
    print(f"\n{text}")
    folders = HydraConfig.get().runtime.output_dir, config["target"]
    for path in map(Path, filter(None, folders)):
        path.mkdir(parents=True, exist_ok=True)
        results.write_json(result, path / "benchmark.json")
        (path / "table.md").write_text(text)
        if config["paper"] == "gpu":
            benchmark.draw(result, path / "speed.svg")
        print(os.path.relpath(path / "table.md"))
    return result


def complete(config: dict[str, Any]) -> torch.device:
    """Choose the device, fill in what depends on it, turn single values into lists.

    Raises:
        ValueError: a knob is out of range, or has no effect beside another.
    """
    gpu = torch.cuda.is_available() and config["device"] != "cpu"
    for knob, value in (DEFAULTS[gpu] | dict(min_seconds=0.1 if gpu else 0.5)).items():
        config[knob] = value if config[knob] is None else config[knob]
    for knob in ROWS | {"what", "batch_sizes", "precisions", "compile"}:
        config[knob] = listed(config[knob])
    for knob, allowed in CHOICES.items():
        if wrong := [value for value in listed(config[knob]) if value not in allowed]:
            names = ", ".join(str(name).lower() for name in allowed)
            raise ValueError(f"{knob} must be of {names}, got {wrong[0]!r}")
    for knob in ("img_sizes", "batch_sizes", "repeats"):
        if not all(isinstance(value, int) and value > 0 for value in listed(config[knob])):
            raise ValueError(f"{knob} must be at least 1, got {config[knob]}")
    asked = config["device"], *config["precisions"], *config["compile"]
    if not gpu and (needs := {"cuda", "tf32", "reduce-overhead"}.intersection(asked)):
        raise ValueError(f"{', '.join(needs)} needs a GPU, and this runs on the CPU")
    both = overridden(HydraConfig.get().overrides.task) & ROWS
    if isinstance(config["paper"], str) and both:
        names = ", ".join(sorted(both))
        raise ValueError(f"paper={config['paper']} chooses its rows itself: leave out {names}")
    return torch.device("cuda" if gpu else "cpu")
