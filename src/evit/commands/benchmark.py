"""Time models that take turns, beside the dense model; write benchmark.json and tables."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from evit.compiling import private_cache
from evit.config import listed, overridden
from evit.measure import speed
from evit.measure.entries import Entry, build, choose, facts
from evit.models.weights import load_checkpoint, read_state_dict
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
doing = "looking at the models"  # what the next line of progress says


@dataclass(frozen=True)
class Group:
    """What the entries of a comparison share."""

    what: str
    batch_size: int
    precision: str
    compile: bool | str

    def __str__(self) -> str:
        return f"{self.what}, batch {self.batch_size}, {self.precision}, {MODES[self.compile]}"


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure by a composed configuration; leave benchmark.json in Hydra's run folder.

    Raises:
        ValueError: the configuration cannot be served; nothing has been written.
    """
    cfg.data.img_size = None  # set for each model
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    folder = Path(HydraConfig.get().runtime.output_dir)
    device = complete(config, overridden(HydraConfig.get().overrides.task))
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it looks for a GPU
    started = time.perf_counter()
    with progress():
        if config["paper"] == "gpu":
            from evit.commands.benchmark_gpu import measure_all

            result = measure_all(config, device)
        else:
            entries = choose(config)
            for entry in sorted(entries, key=lambda entry: entry.dense):
                facts(entry)  # says what is wrong with a model
            result = dict(rows=[], matmul=[], left_out=[])
            found = groups(config)
            for i, group in enumerate(found):
                say(f"{i + 1}/{len(found)} {group}: {len(entries)} models")
                contest(result, entries, group, device, config)
            if "loader" in config["what"]:
                result["loader"] = time_loader(config, entries, device, folder)
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


def groups(config: dict[str, Any]) -> list[Group]:
    kinds = [what for what in config["what"] if what != "loader"]
    names = ("batch_sizes", "precisions", "compile")
    return [Group(*values) for values in product(kinds, *(config[name] for name in names))]


def prepare(
    entry: Entry, group: Group, device: torch.device, min_seconds: float
) -> speed.Contestant:
    """Build an entry's model, with the weights of its checkpoint; compile it and warm it up."""
    dtype = speed.set_precision(group.precision)
    model = build(entry)
    if entry.model.endswith(".ckpt") and not entry.dense:
        load_checkpoint(model, read_state_dict(entry.model))
    images = torch.randn(group.batch_size, 3, entry.img_size, entry.img_size, device=device)
    training = group.what != "inference"
    return speed.Contestant(model.to(device), images, dtype, training, group.compile, min_seconds)


def contest(
    result: dict[str, Any],
    entries: dict[Entry, Entry],
    group: Group,
    device: torch.device,
    config: dict[str, Any],
    until: float = float("inf"),
) -> None:
    """Let entries take turns, and add a row for each to result.

    An entry that does not fit into memory, does not compile, or has not been prepared before
    `until` (time.perf_counter) is left out, with the reason, in result["left_out"]; so are those
    that are compared with it.

    Args:
        entries: each with the one that it is compared with, which is an entry too.
    """
    ready: dict[Entry, speed.Contestant] = {}
    repeats, min_seconds = config["repeats"], config["min_seconds"]
    dtype = speed.set_precision(group.precision)
    with many_compiled(len(entries)):
        for i, (entry, base) in enumerate(entries.items()):
            state = "compiling" if group.compile else "warming up"
            report(f"{group}: {state} {i + 1}/{len(entries)}, {entry}")
            reason = ""
            if base not in (entry, *ready):
                reason = "no dense model to compare with"
            elif time.perf_counter() > until:
                reason = "no time left (run it again: what has been compiled is kept)"
            try:
                if not reason:
                    ready[entry] = prepare(entry, group, device, min_seconds)
                    continue
            except RuntimeError as error:
                memory = isinstance(error, torch.OutOfMemoryError) or "allocate mem" in str(error)
                if not memory and not group.compile:
                    raise
                first = str(error).strip().splitlines()[0]
                reason = "out of memory" if memory else f"does not compile ({first})"
                say(f"  left out: {entry}: {reason}")
            result["left_out"].append(vars(group) | facts(entry) | dict(reason=reason))
        report(f"{group}: {repeats} rounds of {len(ready)} models")
        matmul, matmul_macs = speed.matmul_step(dtype, device)
        calls = [speed.warm_up(matmul, min_seconds / 5, device), *(c.calls for c in ready.values())]
        steps = [matmul, *(contestant.step for contestant in ready.values())]
        seconds = speed.take_turns(steps, calls, repeats, device)
    peak = matmul_macs / seconds[0]
    speeds = dict(zip(ready, group.batch_size / seconds[1:], strict=True))
    result["matmul"].append(vars(group) | dict(macs_per_s=speed.quartiles(peak)[1]))
    for (entry, c), taken in zip(ready.items(), seconds[1:], strict=True):
        row = vars(group) | facts(entry)
        row |= dict(macs_executed=c.macs_executed, memory_bytes=c.memory)
        row |= spread("images_per_s", speeds[entry])
        row |= spread("latency_ms", 1000 * taken)
        row |= spread("ratio", speeds[entry] / speeds[entries[entry]])
        row |= spread("peak_share", speeds[entry] * c.macs_executed / peak)
        row |= dict(compared_with=str(entries[entry]), first_seconds=c.first_seconds)
        row |= dict(calls=c.calls, seconds=[float(f"{s:.6g}") for s in taken])
        row |= dict(paper=published(row)) if config["paper"] else {}
        result["rows"].append(row)


def spread(name: str, values: np.ndarray) -> dict[str, Any]:
    """The median over the rounds, and the quartiles beside it."""
    low, median, high = speed.quartiles(values)
    return {name: median, f"{name}_quartiles": [low, high]}


def published(row: dict[str, Any]) -> dict[str, Any] | None:
    """The paper's speed and MACs of a row, where it has them."""
    if row["what"] != "inference" or len(set(row["keep_rate"])) != 1 or row["reducer"]:
        return None
    return paper.cost(row["model"], row["keep_rate"][0], row["fusion"], row["img_size"])


def many_compiled(count: int) -> Any:
    """Let torch.compile keep a form for each model, where it would fall back on eager silently."""
    from torch._dynamo import config

    private_cache()
    torch.compiler.reset()
    limits: Any = dict(recompile_limit=8 * count + 8, accumulated_recompile_limit=64 * count + 256)
    return config.patch(**limits)


def time_loader(
    config: dict[str, Any], entries: dict[Entry, Entry], device: torch.device, folder: Path
) -> dict[str, Any]:
    """Is training bound by its data? The loader alone, the model alone, and both together.

    They take turns; the model is the one that asks for most images, at the first batch size,
    precision and form of the configuration. A turn of the loader is one pass.
    """
    import lightning as L
    from hydra.utils import instantiate

    entry = min(entries, key=lambda entry: facts(entry)["macs"])
    group = Group(
        "training", max(config["batch_sizes"]), config["precisions"][0], config["compile"][0]
    )
    batches_of_a_pass = 100 if device.type == "cuda" else 8
    data = instantiate(
        config["data"] | dict(img_size=entry.img_size, seed=config["seed"]),
        batch_size=group.batch_size,
        max_train_images=config["max_images"] or batches_of_a_pass * group.batch_size,
        splits=["train"],
        _convert_="all",
    )
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    data.trainer = L.Trainer(
        accelerator=device.type,
        devices=1,
        default_root_dir=folder,
        enable_model_summary=False,
        **quiet,
    )
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    images = len(loader) * group.batch_size
    title = f"{entry} on {data.name}, read by {data.backend}: {group}"
    say(f"{title}; {images} images, {config['repeats']} rounds")

    def batches() -> Iterator[Any]:
        for batch in loader:
            pictures, labels = (x.to(device, non_blocking=True) for x in batch[:2])
            yield data.on_after_batch_transfer((pictures, labels), 0)

    def learn() -> None:
        for pictures, labels in batches():
            contestant.step.learn(pictures, labels)

    contestant = prepare(entry, group, device, config["min_seconds"])
    steps = [lambda: list(map(id, batches())), contestant.step, learn]
    steps[0]()
    seconds = speed.take_turns(steps, [1, contestant.calls, 1], config["repeats"], device)
    counts = dict(loader=images, model=group.batch_size, both=images)
    speeds = {name: n / row for (name, n), row in zip(counts.items(), seconds, strict=True)}
    rows = [dict(name=name) | spread("images_per_s", found) for name, found in speeds.items()]
    share = speed.quartiles(speeds["both"] / speeds["model"])[1]
    alone = speed.quartiles(speeds["loader"] / speeds["model"])[1]
    return dict(title=title, images=images, rows=rows, share=share, verdict=verdict(share, alone))


def verdict(share: float, loader: float) -> str:
    """Say what the speeds of training and of the loader mean, as shares of the model's own."""
    if share >= 0.95:
        found = "Training does not wait for its images"
    elif loader < 1:
        found = "Training waits for its images, which come slower than it would take them"
    else:
        found = "Images come fast enough, but loading takes time from training (the same cores?)"
    return f"{found}: it has {100 * share:.0f} % of the model's own speed."


def say(text: str) -> None:
    print(text, flush=True)


def report(text: str) -> None:
    """Set what the next line of progress says."""
    global doing
    doing = text


@contextmanager
def progress(every: float = 20) -> Iterator[None]:
    """Say every few seconds what is being compiled or timed."""
    done, started = threading.Event(), time.monotonic()

    def beat() -> None:
        while not done.wait(every):
            say(f"  {time.monotonic() - started:.0f} s: {doing}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
