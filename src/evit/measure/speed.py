"""Time and memory of models, which take turns with their dense baselines: machines are noisy."""

import functools
import json
import os
import time
from collections.abc import Callable
from itertools import product
from math import ceil, inf
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evit.measure import count_macs, count_params
from evit.models import create_model
from evit.models.registry import NAMES, reduced
from evit.report import MODES, Row, paper

Step = Callable[[], object]
DTYPES = dict(fp32=torch.float32, tf32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


class Entry(NamedTuple):  # one model at one setting
    model: str
    keep_rate: Any = 1.0  # or a tuple, one for each place
    fusion: bool | None = None  # None: the model's default, as for reducer
    img_size: int = paper.BASE_SIZE
    dense: bool = False  # timm's own model, or the LV-ViT that keeps every token
    reducer: str | None = None
    options: str = "{}"  # further arguments of the model as JSON; `reducer` as in conf/reducer

    def __str__(self) -> str:
        rate = "dense" if self.dense else f"keep_rate={self.keep_rate}"
        return " ".join(filter(None, (self.model, self.reducer, rate, f"img_size={self.img_size}")))


class Group(NamedTuple):  # settings shared by all entries of one comparison
    what: str
    batch_size: int
    precision: str
    compile: bool | str

    def __str__(self) -> str:
        return f"{self.what}, batch {self.batch_size}, {self.precision}, {MODES[self.compile]}"


def choose(config: Row) -> dict[Entry, Entry]:
    """Choose the models of a configuration, or of the paper, each with its dense baseline."""
    if isinstance(table := config["paper"], str):
        name, rows = paper.MODELS[table], paper.costs(table)
        chosen = [Entry(name, row["keep_rate"], row["fusion"], row["img_size"]) for row in rows]
        return compared([e if e.keep_rate != 1 else dense(e) for e in chosen], at_base_size=True)
    chosen, knobs = [], ("models", "img_sizes", "reducers", "keep_rates", "fusion")
    for (model, options), size, name, rate, fusion in product(*(config[knob] for knob in knobs)):
        node = config["reducers"][name]
        fuses = "fusion" in node if name else not model.startswith("dynamicvit")
        rate = tuple(rate) if isinstance(rate, list) else rate
        options = json.dumps(options | (dict(reducer=node) if name else {}))
        chosen.append(Entry(model, rate, fusion if fuses else None, size, False, name, options))
    return compared(chosen, at_base_size=bool(table))


def compared(chosen: list[Entry], at_base_size: bool) -> dict[Entry, Entry]:
    """Map entries to their dense baselines: entries too, of 224 px at_base_size as the paper's."""
    entries = dict[Entry, Entry]()
    for entry in chosen:
        base = dense(entry)
        if at_base_size and entry.model in paper.NAMES:
            base = base._replace(img_size=paper.BASE_SIZE)
        entries[base] = base
        if not entry.dense and base.model not in NAMES:  # what it gains is not the reduction's
            entries[base._replace(model=entry.model, dense=False)] = base
        if entry.dense or entry.keep_rate != 1:
            entries[entry] = base
    return entries


def dense(entry: Entry) -> Entry:
    name = entry.model.removeprefix("evit_").removeprefix("dynamicvit_")
    name += "_224" * (name != entry.model and name.startswith("deit"))
    options = {k: v for k, v in json.loads(entry.options).items() if k != "reducer"}
    return Entry(name, img_size=entry.img_size, dense=True, options=json.dumps(options))


def build(entry: Entry) -> nn.Module:
    """Build an entry's model with random weights; a ValueError if it refuses the options."""
    knobs: Row = {} if entry.dense else dict(keep_rate=entry.keep_rate, fusion=entry.fusion)
    options = json.loads(entry.options)
    if node := options.get("reducer"):
        node |= {k: v for k, v in knobs.items() if k in node}
        knobs = dict(reducer=instantiate(node, _convert_="all"))
    make = create_model if entry.dense or entry.model in NAMES else reduced
    try:
        return make(entry.model, img_size=entry.img_size, **options | knobs)
    except TypeError as error:
        raise ValueError(f"{entry}: {error}") from error


@functools.cache
def facts(entry: Entry) -> Row:
    """Describe an entry, with parameters and published MACs; a baseline keeps every token."""
    with torch.device("meta"):
        model: Any = build(entry)
        counted: Any = build(entry._replace(dense=False)) if entry.dense else model
    row = entry._asdict() | dict(keep_rate=list(counted.reducer.keep_rate))
    del row["options"]
    return row | dict(params=count_params(model), macs=count_macs(counted))


def keep_compiled() -> None:
    """Let torch.compile keep a graph on disk for each combination of token counts."""
    # The default cache is a folder in /tmp with a predictable name: other users could fill it.
    folder = os.path.expanduser("~/.cache/evit-lab/inductor")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
    limits: Any = torch.compiler.config
    limits.recompile_limit = limits.accumulated_recompile_limit = 4096


def set_precision(precision: str) -> None:
    """Use TF32 for float32 matrix products from now on, or full float32."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def timed(step: Step, calls: int, device: torch.device) -> float:
    """Run a step `calls` times; return the seconds."""
    wait = torch.get_device_module(device).synchronize
    wait()
    started = time.perf_counter()
    for _ in range(calls):
        if device.type == "cuda":  # on a CPU it would only import the compiler, for seconds
            torch.compiler.cudagraph_mark_step_begin()
        step()
    wait()
    return time.perf_counter() - started


def warm_up(step: Step, min_seconds: float, device: torch.device) -> int:
    """Warm a step up; return the number of calls that takes min_seconds."""
    timed(step, 2, device)
    few = ceil(min_seconds / 10 / timed(step, 1, device))
    return ceil(min_seconds * few / timed(step, few, device))


def take_turns(steps: list[Step], calls: list[int], repeats: int, device: torch.device) -> Any:
    """Time all steps in each round, in rotating order: seconds per call, (steps, rounds)."""
    seconds, n = np.empty((len(steps), repeats)), len(steps)
    for turn in range(repeats):
        for i in np.roll(range(n), -turn):
            seconds[i, turn] = timed(steps[i], calls[i], device) / calls[i]
    return seconds


def peak_memory(step: Step, device: torch.device) -> int:
    """Measure the most bytes that a step holds in PyTorch's allocator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed(step, 1, device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it warns if there is no GPU
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.cumsum([0] + [size for _, size in changes]).max())


def make_step(model: nn.Module, forward: Any, images: Tensor, dtype: torch.dtype | None) -> Step:
    """Make a function that runs one inference, or in training mode an AdamW step with autocast."""
    if not model.training:
        return torch.no_grad()(lambda: forward(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=images.is_cuda or None)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype, enabled=dtype not in (None, torch.float32)):
            loss = nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step


def prepare(entry: Entry, group: Group, device: torch.device, min_seconds: float) -> Any:
    """Build and warm up an entry: its step, its calls per round, and its row of the result."""
    dtype, training = DTYPES[group.precision], group.what == "training"
    own: Any = dict(device=device, dtype=torch.float32 if training else dtype)
    model: Any = build(entry).to(**own).train(training).requires_grad_(training)
    images = torch.randn(group.batch_size, 3, entry.img_size, entry.img_size, **own)
    forward, memory = model, None
    with FlopCounterMode(display=False) as counter:
        make_step(model, model, images, dtype)()
    if group.compile:
        mode = group.compile if isinstance(group.compile, str) else None
        forward = torch.compile(model, mode=mode, dynamic=False, fullgraph=True)
    step = make_step(model, forward, images, dtype)
    calls = warm_up(step, min_seconds, device)
    if group.compile != "reduce-overhead":  # the allocator does not see a CUDA graph's memory
        model.zero_grad()
        copies = 3 if training else 1  # AdamW keeps two numbers for each weight
        held = [*[*model.parameters()] * copies, *model.buffers(), images]
        memory = peak_memory(step, device) + sum(t.nbytes for t in held)
    costs = dict(macs_executed=counter.get_total_flops() // 2 // group.batch_size)
    return step, calls, group._asdict() | facts(entry) | costs | dict(memory_bytes=memory)


def compare(result: Row, entries: dict, group: Group, device: Any, config: Row, until=inf) -> None:
    """Time entries in turns with their baselines: rows of result, or of its left_out."""
    keep_compiled()
    torch.compiler.reset()
    set_precision(group.precision)
    n = 8192 if device.type == "cuda" else 1024  # large enough to show the peak
    a, b = torch.randn(2, n, n, device=device).to(DTYPES[group.precision])
    steps: list[Step] = [lambda: torch.mm(a, b)]
    calls, rows = [warm_up(steps[0], config["min_seconds"] / 5, device)], dict[Entry, Row]()
    for i, (entry, base) in enumerate(entries.items(), 1):
        result["at"] = f"warming up {i}/{len(entries)}: {entry}"
        try:
            if base not in (entry, *rows):
                raise RuntimeError("no dense model to compare with")
            if time.perf_counter() > until:
                raise RuntimeError("no time left: run it again, what has been compiled is kept")
            step, count, rows[entry] = prepare(entry, group, device, config["min_seconds"])
            steps, calls = [*steps, step], [*calls, count]
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"  left out: {entry}: {reason}", flush=True)
            result["left_out"].append(group._asdict() | facts(entry) | dict(reason=reason))
    result["at"] = f"timing {len(rows)} models in {config['repeats']} rounds"
    matmul, *each = take_turns(steps, calls, config["repeats"], device)
    seconds, peak = dict(zip(rows, each, strict=True)), n**3 / matmul
    result["matmul"].append(group._asdict() | dict(macs_per_s=float(np.median(peak))))
    for entry, row in rows.items():
        own, base, speed = seconds[entry], entries[entry], group.batch_size / seconds[entry]
        row |= dict(compared_with=str(base), seconds=own.round(9).tolist())
        numbers = dict(images_per_s=speed, latency_ms=1000 * own, ratio=seconds[base] / own)
        numbers["peak_share"] = row["macs_executed"] * speed / peak
        for name, values in numbers.items():
            low, row[name], high = np.percentile(values, [25, 50, 75]).tolist()
            row[f"{name}_quartiles"] = [low, high]
        if config["paper"] and not entry.reducer and group.what == "inference":
            row["paper"] = paper.cost(entry.model, entry.keep_rate, entry.fusion, entry.img_size)
    result["rows"] += rows.values()
