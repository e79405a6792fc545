"""Time models that take turns, beside the dense model; write benchmark.json and tables."""

import logging
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from evit.commands.benchmark_gpu import measure_all, time_loader
from evit.config import listed, overridden
from evit.measure import speed
from evit.measure.contest import Group, contest, progress, say
from evit.measure.entries import choose, facts
from evit.report import paper, results
from evit.report.benchmark import MODES, draw, show, write

GPU_DEFAULTS = dict(
    batch_sizes=[1, 32, 256], precisions=["bf16"], compile=list(MODES), min_seconds=0.1
)
CPU_DEFAULTS = dict(batch_sizes=[8], precisions=["fp32"], compile=[False], min_seconds=0.5)
LISTS = "what models keep_rates fusion img_sizes batch_sizes precisions compile reducers"
CHOICES: dict[str, tuple[Any, ...]] = dict(
    device=("auto", "cpu", "cuda"),
    what=("inference", "training", "loader"),
    precisions=tuple(speed.PRECISIONS),
    compile=tuple(MODES),
    fusion=(True, False),
    paper=(False, True, *paper.MODELS, "field", "gpu"),
)
CHOSEN_BY_PAPER = set("models keep_rates fusion img_sizes reducer reducers checkpoint".split())


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure by a composed configuration; leave benchmark.json in Hydra's run folder.

    Raises:
        ValueError: the configuration cannot be served; nothing has been written.
    """
    cfg.data.img_size = None  # set for each model
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    folder = Path(HydraConfig.get().runtime.output_dir)
    given = list(HydraConfig.get().overrides.task)
    device = complete(config, overridden(given))
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it looks for a GPU
    started = time.perf_counter()
    with progress():
        if config["paper"] == "gpu":
            result = measure_all(config, device)
        else:
            entries = choose(config)
            say(f"{len(entries)} models on {results.device_name(device)}")
            for entry in sorted(entries, key=lambda entry: entry.dense):
                facts(entry)  # says what is wrong with a model
            result = dict(rows=[], matmul=[], left_out=[])
            kinds = [what for what in config["what"] if what != "loader"]
            names = ("batch_sizes", "precisions", "compile")
            groups = list(product(kinds, *(config[name] for name in names)))
            for i, values in enumerate(groups):
                group = Group(*values)
                say(f"{i + 1}/{len(groups)} {group}")
                contest(result, entries, group, device, config)
            if "loader" in config["what"]:
                result["loader"] = time_loader(config, device, given)
    result |= dict(
        config=config,
        device=results.device_name(device),
        threads=torch.get_num_threads(),
        seconds=round(time.perf_counter() - started, 1),
    )
    result |= results.provenance()
    folder.mkdir(parents=True, exist_ok=True)
    results.write_json(result, folder / "benchmark.json")
    show(result, folder / "benchmark.json")
    target = Path(config["target"] or folder)
    if config["paper"] == "gpu":
        draw(result, target / "speed.svg")
    if config["target"]:
        write(result, target)
    return result


def complete(config: dict[str, Any], given: set[str]) -> torch.device:
    """Choose the device, fill in what depends on it, turn single values into lists.

    Raises:
        ValueError: a knob is out of range, or has no effect beside another.
    """
    found = torch.cuda.is_available()
    check(found or config["device"] != "cuda", "PyTorch finds no GPU here: take device=cpu")
    gpu = found and config["device"] != "cpu"
    for knob, value in (GPU_DEFAULTS if gpu else CPU_DEFAULTS).items():
        config[knob] = value if config[knob] is None else config[knob]
    config["reducers"] = config["reducers"] or config["reducer"]
    if path := config["checkpoint"]:
        source = results.run_config(path)
        advice = f"checkpoint={path} must be RUN/checkpoints/NAME.ckpt beside RUN/config.json"
        check(source, f"{advice}: models=NAME times any other model")
        check("models" not in given, "checkpoint=PATH is of one model: leave out models")
        check("loader" not in config["what"], "what=loader trains a model of models=NAME")
        config["models"] = path
        config["img_sizes"] = config["img_sizes"] if "img_sizes" in given else source["img_size"]
    for knob in LISTS.split():
        config[knob] = listed(config[knob])
        check(config[knob], f"{knob} is an empty list")
    for knob, allowed in CHOICES.items():
        for value in listed(config[knob]):
            known = value in allowed and type(value) in {type(a) for a in allowed}
            names = ", ".join(str(a).lower() for a in allowed)
            check(known, f"{knob} must be of {names}, got {value!r}")
    for knob in ("img_sizes", "batch_sizes", "repeats", "max_images", "threads"):
        for value in listed(config[knob]):
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            none = value is None and knob in ("max_images", "threads")
            check(whole or none, f"{knob} must be at least 1, got {value!r}")
    check(config["min_seconds"] > 0, f"min_seconds must be above 0, got {config['min_seconds']}")
    check(gpu or "tf32" not in config["precisions"], "tf32 is a GPU's: fp32, bf16 or fp16 here")
    graphs = "reduce-overhead" in config["compile"]
    check(gpu or not graphs, "reduce-overhead is CUDA graphs, for a GPU: compile=true here")
    scaled = "training" in config["what"] and "fp16" in config["precisions"]
    check(not scaled, "training in fp16 needs loss scaling, which is not timed: bf16 or fp32")
    both = ", ".join(sorted(given & CHOSEN_BY_PAPER)) if isinstance(config["paper"], str) else ""
    advice = f"leave out {both}, or take paper=true"
    check(not both, f"paper={config['paper']} chooses the rows of the paper's tables: {advice}")
    return torch.device("cuda" if gpu else "cpu")


def check(right: Any, message: str) -> None:
    if not right:
        raise ValueError(message)
