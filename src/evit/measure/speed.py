"""Time and memory of models, beside the dense model.

Machines are noisy and their speed drifts, so models that are compared take turns, round after
round, and are compared within each round.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evit.measure.entries import Entry, build, facts
from evit.report import paper
from evit.report.benchmark import MODES

Step = Callable[[], object]
DTYPES = dict(fp32=torch.float32, tf32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


def keep_compiled() -> None:
    """Let torch.compile make a graph for each combination of token counts, and keep it on disk."""
    # By default the cache is a folder of /tmp whose name others can guess.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{Path.home()}/.cache/evit-lab/inductor")
    limits: Any = torch.compiler.config
    limits.recompile_limit = limits.accumulated_recompile_limit = 4096


def timed(step: Step, calls: int, device: torch.device) -> float:
    """Seconds that this many calls take."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(calls):
        torch.compiler.cudagraph_mark_step_begin()
        step()
    wait()
    return time.perf_counter() - started


def warm_up(step: Step, min_seconds: float, device: torch.device) -> int:
    """Call a step until it is warm; return how many calls take min_seconds."""
    timed(step, 2, device)
    few = math.ceil(min_seconds / 10 / timed(step, 1, device))
    return math.ceil(min_seconds * few / timed(step, few, device))


def take_turns(
    steps: Sequence[Step], calls: Sequence[int], repeats: int, device: torch.device
) -> np.ndarray:
    """Seconds of one call, (steps, rounds); in each round another step is first."""
    seconds, n = np.empty((len(steps), repeats)), len(steps)
    for turn in range(repeats):
        for i in np.roll(range(n), -turn):
            seconds[i, turn] = timed(steps[i], calls[i], device) / calls[i]
    return seconds


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes of the tensors that a step allocates, at their most, by PyTorch's allocator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed(step, 1, device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler complains of absent GPUs
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events)
    return int(np.cumsum([0] + [size for _, size in changes]).max())


def make_step(
    model: nn.Module, forward: Callable[[Tensor], Any], images: Tensor, dtype: torch.dtype | None
) -> Step:
    """A forward pass of a model, or of its compiled form `forward`, without gradients.

    In training mode a step of AdamW, in autocast to dtype (float32 or None: without).
    """
    if not model.training:
        return torch.no_grad()(lambda: forward(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=images.is_cuda or None)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype, enabled=dtype not in (None, torch.float32)):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step


class Group(NamedTuple):
    """What the entries of a comparison share."""

    what: str
    batch_size: int
    precision: str
    compile: bool | str

    def __str__(self) -> str:
        return f"{self.what}, batch {self.batch_size}, {self.precision}, {MODES[self.compile]}"


def set_precision(precision: str) -> None:
    """Multiply float32 matrices in TF32 from now on, or exactly."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def prepare(
    entry: Entry, group: Group, device: torch.device, min_seconds: float
) -> tuple[Step, int, dict[str, Any]]:
    """An entry's step, compiled and warm; how many calls a turn has; its facts, memory and MACs."""
    dtype, training = DTYPES[group.precision], group.what == "training"
    own: Any = dict(device=device, dtype=torch.float32 if training else dtype)
    model: Any = build(entry).to(**own).train(training).requires_grad_(training)
    images = torch.randn(group.batch_size, 3, entry.img_size, entry.img_size, **own)
    with FlopCounterMode(display=False) as counter:
        make_step(model, model, images, dtype)()
    forward = model
    if group.compile:
        mode = group.compile if isinstance(group.compile, str) else None
        forward = torch.compile(model, mode=mode, dynamic=False, fullgraph=True)
    step, memory = make_step(model, forward, images, dtype), None
    first, calls = timed(step, 1, device), warm_up(step, min_seconds, device)
    if group.compile != "reduce-overhead":  # the memory of a CUDA graph is not seen
        model.zero_grad()
        copies = 3 if training else 1  # AdamW keeps two numbers for each weight
        held = [*[*model.parameters()] * copies, *model.buffers(), images]
        memory = peak_memory(step, device) + sum(t.nbytes for t in held)
    macs = counter.get_total_flops() // 2 // group.batch_size
    row = dict(macs_executed=macs, first_seconds=first, memory_bytes=memory)
    return step, calls, group._asdict() | facts(entry) | row


def contest(
    result: dict[str, Any],
    entries: dict[Entry, Entry],
    group: Group,
    device: torch.device,
    config: dict[str, Any],
    until: float = math.inf,
) -> None:
    """Let entries take turns, each beside its dense model, and add a row for each to result.

    What PyTorch cannot run, or is not begun `until` a time.perf_counter(), is "left_out".
    """
    keep_compiled()
    torch.compiler.reset()
    set_precision(group.precision)
    n = 8192 if device.type == "cuda" else 1024  # large enough to show the peak
    a, b = torch.randn(2, n, n, device=device).to(DTYPES[group.precision])
    steps: list[Step] = [lambda: torch.mm(a, b)]
    calls, rows = [warm_up(steps[0], config["min_seconds"] / 5, device)], dict[Entry, Any]()
    for i, (entry, base) in enumerate(entries.items(), 1):
        result["at"] = f"warming up {i}/{len(entries)}: {entry}"
        try:
            if base not in (entry, *rows):
                raise RuntimeError("no dense model to compare with")
            if time.perf_counter() > until:
                raise RuntimeError("no time left: run it again, what has been compiled is kept")
            step, count, rows[entry] = prepare(entry, group, device, config["min_seconds"])
            steps, calls = [*steps, step], [*calls, count]
            if group.compile:
                print(f"  compiled in {rows[entry]['first_seconds']:.0f} s: {entry}", flush=True)
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"  left out: {entry}: {reason}", flush=True)
            result["left_out"].append(group._asdict() | facts(entry) | dict(reason=reason))
    result["at"] = f"timing {len(rows)} models in {config['repeats']} rounds"
    product, *each = take_turns(steps, calls, config["repeats"], device)
    seconds = dict(zip(rows, each, strict=True))
    result["matmul"].append(group._asdict() | dict(macs_per_s=float(np.median(n**3 / product))))
    for entry, row in rows.items():
        own, base = seconds[entry], entries[entry]
        row |= dict(compared_with=str(base), seconds=own.round(9).tolist())
        peak_share = row["macs_executed"] * group.batch_size / own * product / n**3
        numbers = dict(images_per_s=group.batch_size / own, latency_ms=1000 * own)
        numbers |= dict(ratio=seconds[base] / own, peak_share=peak_share)
        for name, values in numbers.items():
            low, row[name], high = np.percentile(values, [25, 50, 75]).tolist()
            row[f"{name}_quartiles"] = [low, high]
        rates = set(row["keep_rate"])
        if config["paper"] and not entry.reducer and group.what == "inference" and len(rates) == 1:
            row["paper"] = paper.cost(entry.model, rates.pop(), entry.fusion, entry.img_size)
    result["rows"] += rows.values()
