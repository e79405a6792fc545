"""One benchmark: choose what is timed, let it take turns, write benchmark.json."""

import logging
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evit.config import listed, overridden
from evit.measure.contest import Entry, Group, contest, dense_entry, facts, is_own
from evit.measure.steps import PRECISIONS
from evit.recipe import Recipe
from evit.report import benchmarks, field, paper, results

WHAT = ("inference", "training", "loader")
COMPILE = (False, True, "reduce-overhead")
BATCHES = {"cuda": 100, "cpu": 8}  # of a pass of the loader, where max_images says nothing
CHOSEN_BY_PAPER = {"models", "keep_rates", "fusion", "img_sizes"}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure by a composed configuration; leave benchmark.json in Hydra's run folder.

    Raises:
        ValueError: the configuration cannot be served; nothing has been written.
    """
    cfg.data.img_size = None  # set for each model
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    folder = Path(HydraConfig.get().runtime.output_dir)
    device = choose_device(config["device"])
    complete(config, device, overridden(HydraConfig.get().overrides.task))
    entries = choose(config)
    for entry in entries:
        facts(entry)  # what is wrong with a model is said here
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    # Of torch.compile, which looks for a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    started = time.perf_counter()
    names = ("batch_sizes", "precisions", "compile")
    kinds = [what for what in config["what"] if what != "loader"]
    groups = [Group(*values) for values in product(kinds, *(config[name] for name in names))]
    rows, peaks = [], []
    for i, group in enumerate(groups):
        say(f"{i + 1}/{len(groups)} {group}: {len(entries)} models, {config['repeats']} rounds")
        with progress((len(entries) + 1) * (config["repeats"] + 1) - 1) as report:
            found, peak = contest(
                entries, group, device, config["repeats"], config["min_seconds"], report
            )
        rows += found
        peaks.append(vars(group) | dict(macs_per_s=peak))
    if config["paper"]:
        rows = [row | dict(paper=published(row)) for row in rows]
    result: dict[str, Any] = dict(rows=rows, matmul=peaks)
    if "loader" in config["what"]:
        from evit.measure.data_bound import compare_readers, data_bound
        from evit.training.trainer import quiet

        quiet()
        fastest = min(entries, key=lambda entry: facts(entry)["macs"])  # asks for most images
        readers = compare_readers(config, fastest.img_size, say)  # forks: before FFCV has threads
        data = open_data(config, fastest.img_size, device, folder)
        bound = data_bound(config, fastest, data, device, say)
        result["loader"] = bound | dict(readers=readers)
    result |= dict(
        config=config,
        device=results.device_name(device),
        threads=torch.get_num_threads(),
        seconds=round(time.perf_counter() - started, 1),
    )
    result |= results.provenance()
    folder.mkdir(parents=True, exist_ok=True)
    results.write_json(result, folder / "benchmark.json")
    benchmarks.show(result, folder / "benchmark.json")
    if config["target"]:
        benchmarks.write(result, Path(config["target"]))
    return result


def open_data(config: dict[str, Any], img_size: int, device: torch.device, folder: Path) -> Any:
    """The data module of training images, at most max_images, with crops and flips."""
    import lightning as L
    from hydra.utils import instantiate

    batch_size = config["batch_sizes"][0]
    data = instantiate(
        config["data"] | dict(img_size=img_size, seed=config["seed"]),
        recipe=Recipe(
            epochs=1,
            lr=1,
            batch_size=batch_size,
            max_train_images=config["max_images"] or BATCHES[device.type] * batch_size,
        ),
        splits=["train"],
        _convert_="object",
    )
    options: Any = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data.trainer = L.Trainer(
        accelerator=device.type,
        devices=1,
        default_root_dir=folder,
        enable_model_summary=False,
        **options,
    )
    data.prepare_data()
    data.setup()
    return data


def choose_device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: PyTorch finds no GPU here; device=cpu")
    gpu = torch.cuda.is_available() and name != "cpu"
    return torch.device("cuda" if gpu else "cpu")


def complete(config: dict[str, Any], device: torch.device, given: set[str]) -> None:
    """Turn single values into lists, fill in what depends on the device, refuse the rest.

    Raises:
        ValueError: a knob is out of range, or has no effect beside another.
    """
    config["batch_sizes"] = config["batch_sizes"] or (128 if device.type == "cuda" else 8)
    lists = ("what", "models", "keep_rates", "fusion", "img_sizes", "batch_sizes", "precisions")
    for knob in (*lists, "compile"):
        config[knob] = listed(config[knob])
        if not config[knob]:
            raise ValueError(f"{knob} is an empty list")
    choices: dict[str, tuple[Any, ...]] = dict(
        what=WHAT, precisions=tuple(PRECISIONS), compile=COMPILE, fusion=(True, False)
    )
    choices["paper"] = (False, True, *paper.MODELS, "field")
    for knob, allowed in choices.items():
        for value in listed(config[knob]):
            if value not in allowed or type(value) not in {type(a) for a in allowed}:
                names = ", ".join(str(a).lower() for a in allowed)
                raise ValueError(f"{knob} must be of {names}, got {value!r}")
    for knob in ("img_sizes", "batch_sizes", "repeats", "max_images", "threads"):
        for value in listed(config[knob]):
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not whole and not (value is None and knob in ("max_images", "threads")):
                raise ValueError(f"{knob} must be at least 1, got {value!r}")
    if config["min_seconds"] <= 0:
        raise ValueError(f"min_seconds must be above 0, got {config['min_seconds']}")
    if device.type == "cpu" and "tf32" in config["precisions"]:
        raise ValueError("precision tf32 is a GPU's: fp32, bf16 or fp16 here")
    if device.type == "cpu" and "reduce-overhead" in config["compile"]:
        raise ValueError("compile=reduce-overhead is CUDA graphs, for a GPU: compile=true here")
    if "training" in config["what"] and "fp16" in config["precisions"]:
        raise ValueError("training in fp16 needs loss scaling, which is not timed: bf16 or fp32")
    if isinstance(config["paper"], str) and (both := sorted(given & CHOSEN_BY_PAPER)):
        raise ValueError(
            f"paper={config['paper']} chooses the rows of the paper's tables: leave out "
            f"{', '.join(both)}, or take paper=true"
        )


def choose(config: dict[str, Any]) -> dict[Entry, Entry]:
    """What is timed, the dense models first, each with the dense model that it is compared with.

    That has the same image size; beside the paper's numbers it has 224 px, as theirs.
    """
    chosen: list[Entry] = []
    if config["paper"] == "field":
        chosen += [
            Entry(row["timm"], img_size=row.get("img_size", paper.BASE_SIZE), dense=True)
            for row in field.rows()
            if "timm" in row
        ]
        for name, model in paper.MODELS.items():
            rates = [row["keep_rate"] for row in paper.tables()[f"keep_rate_{name}"]["fuse"]]
            chosen += [Entry(model, rate, True, paper.BASE_SIZE) for rate in rates]
    elif isinstance(config["paper"], str):
        name = paper.MODELS[config["paper"]]
        for row in paper.costs(config["paper"]):
            size = row["img_size"]
            sparse = Entry(name, row["keep_rate"], row["fusion"], size)
            chosen.append(dense_entry(name, size) if row["keep_rate"] == 1 else sparse)
    else:
        for model, size in product(config["models"], config["img_sizes"]):
            chosen.append(dense_entry(model, size))
            for rate, fusion in product(config["keep_rates"], config["fusion"]):
                rate = tuple(rate) if isinstance(rate, list) else rate
                chooses = rate != 1 and not model.startswith("dynamicvit_")
                if rate != 1 or not (is_own(model) and dense_entry(model, size).model == model):
                    chosen.append(Entry(model, rate, fusion if chooses else None, size))
    entries: dict[Entry, Entry] = {}
    for entry in chosen:
        ours = not config["paper"] or config["paper"] == "field" and entry.model not in paper.NAMES
        base = dense_entry(entry.model, entry.img_size if ours else paper.BASE_SIZE)
        entries |= {base: base}
        entries |= {entry: base}
    return entries


def published(row: dict[str, Any]) -> dict[str, Any] | None:
    """The paper's speed and MACs of a row, where it has them."""
    if row["what"] != "inference" or len(set(row["keep_rate"])) != 1:
        return None
    return paper.cost(row["model"], row["keep_rate"][0], row["fusion"], row["img_size"])


class progress:
    """A bar on the terminal while models are timed; nothing elsewhere."""

    def __init__(self, total: int):
        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.bar = Progress(
            *columns,
            TextColumn("{task.description}"),
            transient=True,
            auto_refresh=False,  # not while anything is timed
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("building", total=total)

    def __enter__(self) -> Any:
        self.bar.start()
        return lambda text: self.bar.update(self.task, description=text, advance=1, refresh=True)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def say(text: str) -> None:
    print(text, flush=True)
