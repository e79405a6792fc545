"""Let models take turns on one machine, beside the dense model."""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from evit.measure import speed
from evit.measure.entries import Entry, build, facts
from evit.report import paper
from evit.report.benchmark import MODES

DTYPES = dict(fp32=torch.float32, tf32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


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
) -> tuple[speed.Step, int, dict[str, Any]]:
    """An entry's step, compiled and warm; how many calls a turn has; its memory and MACs."""
    dtype, training = DTYPES[group.precision], group.what == "training"
    model = build(entry).to(device).train(training).requires_grad_(training)
    images = torch.randn(group.batch_size, 3, entry.img_size, entry.img_size, device=device)
    cast = dtype if training and dtype != torch.float32 else None
    if not training:
        model, images = model.to(dtype), images.to(dtype)
    step = speed.make_step(model, model, images, cast)
    with FlopCounterMode(display=False) as counter:
        step()
    row: dict[str, Any] = dict(macs_executed=counter.get_total_flops() // 2 // group.batch_size)
    if group.compile:
        mode = group.compile if isinstance(group.compile, str) else None
        forward: Any = torch.compile(model, mode=mode, dynamic=False, fullgraph=True)
        step = speed.make_step(model, forward, images, cast)
    row |= dict(first_seconds=speed.timed(step, 1, device), memory_bytes=None)
    calls = speed.warm_up(step, min_seconds, device)
    if group.compile != "reduce-overhead":  # the memory of a CUDA graph is not seen
        model.zero_grad()
        copies = 3 if training else 1  # AdamW keeps two numbers for each weight
        held = [*[*model.parameters()] * copies, *model.buffers(), images]
        row["memory_bytes"] = speed.peak_memory(step, device) + sum(t.nbytes for t in held)
    return step, calls, row


def contest(
    result: dict[str, Any],
    entries: dict[Entry, Entry],
    group: Group,
    device: torch.device,
    config: dict[str, Any],
    until: float = float("inf"),
) -> None:
    """Let entries take turns, each beside its dense model, and add a row for each to result.

    What does not fit into memory, does not compile, or is not begun `until` a time.perf_counter()
    goes to result["left_out"], with the reason, and so does what is compared with it.
    """
    if group.compile:  # a form of each model is kept, in a cache that outlives the process
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{Path.home()}/.cache/evit-lab/inductor")
        torch.compiler.reset()
        torch.compiler.config.recompile_limit = 4096
    set_precision(group.precision)
    n = 8192 if device.type == "cuda" else 1024  # large enough to show the peak
    a, b = torch.randn(2, n, n, device=device).to(DTYPES[group.precision])
    steps: list[speed.Step] = [lambda: torch.mm(a, b)]
    calls = [speed.warm_up(steps[0], config["min_seconds"] / 5, device)]
    ready: dict[Entry, dict[str, Any]] = {}
    for entry, base in entries.items():
        reason = "no dense model (to compare with)" if base not in (entry, *ready) else ""
        if not reason and time.perf_counter() > until:
            reason = "no time left (run it again: what has been compiled is kept)"
        try:
            if not reason:
                step, count, own = prepare(entry, group, device, config["min_seconds"])
                ready[entry] = group._asdict() | facts(entry) | own
                steps, calls = [*steps, step], [*calls, count]
                if group.compile:
                    print(f"  compiled in {own['first_seconds']:.0f} s: {entry}", flush=True)
        except RuntimeError as error:
            memory = isinstance(error, torch.OutOfMemoryError) or "allocate mem" in str(error)
            if not memory and not group.compile:
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = "out of memory" if memory else f"does not compile ({first})"
        if reason:
            print(f"  left out: {entry}: {reason}", flush=True)
            result["left_out"].append(group._asdict() | facts(entry) | dict(reason=reason))
    seconds = speed.take_turns(steps, calls, config["repeats"], device)
    peak, speeds = n**3 / seconds[0], dict(zip(ready, group.batch_size / seconds[1:], strict=True))
    result["matmul"].append(group._asdict() | dict(macs_per_s=float(np.median(peak))))
    for entry, row in ready.items():
        own, base = speeds[entry], entries[entry]
        row |= dict(compared_with=str(base), seconds=(group.batch_size / own).round(9).tolist())
        numbers = dict(images_per_s=own, latency_ms=1000 * group.batch_size / own)
        numbers |= dict(ratio=own / speeds[base], peak_share=own * row["macs_executed"] / peak)
        for name, values in numbers.items():
            low, row[name], high = np.percentile(values, [25, 50, 75]).tolist()
            row[f"{name}_quartiles"] = [low, high]
        rates = set(row["keep_rate"])
        if config["paper"] and not entry.reducer and group.what == "inference" and len(rates) == 1:
            row["paper"] = paper.cost(entry.model, rates.pop(), entry.fusion, entry.img_size)
        result["rows"].append(row)
