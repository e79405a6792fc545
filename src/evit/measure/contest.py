"""Let models take turns on one machine, beside the dense model."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from evit.measure import speed
from evit.measure.entries import Entry, build, facts
from evit.report import paper
from evit.report.benchmark import MODES


class Group(NamedTuple):
    """What the entries of a comparison share."""

    what: str
    batch_size: int
    precision: str
    compile: bool | str

    def __str__(self) -> str:
        return f"{self.what}, batch {self.batch_size}, {self.precision}, {MODES[self.compile]}"


def prepare(
    entry: Entry, group: Group, device: torch.device, min_seconds: float
) -> SimpleNamespace:
    """An entry's step, compiled and warm; how many calls a turn has; its memory and MACs."""
    dtype, training = speed.set_precision(group.precision), group.what == "training"
    model = build(entry).to(device).train(training).requires_grad_(training)
    images = torch.randn(group.batch_size, 3, entry.img_size, entry.img_size, device=device)
    if not training:
        model, images = model.to(dtype), images.to(dtype)

    def step_of(forward: Any) -> speed.Step:
        if training:
            return speed.training_step(model, forward, images, dtype)
        return speed.inference_step(forward, images)

    with FlopCounterMode(display=False) as counter:
        step_of(model)()
    macs, forward, memory = counter.get_total_flops() // 2 // group.batch_size, model, None
    if group.compile:
        mode = group.compile if isinstance(group.compile, str) else None
        forward = torch.compile(model, mode=mode, dynamic=False, fullgraph=True)  # type: ignore
    step = step_of(forward)
    first = speed.timed(step, 1, device)
    calls = speed.warm_up(step, min_seconds, device)
    if group.compile != "reduce-overhead":  # the memory of a CUDA graph is not seen
        model.zero_grad()
        copies = 3 if training else 1  # AdamW keeps two numbers for each weight
        held = [*[*model.parameters()] * copies, *model.buffers(), images]
        memory = speed.peak_memory(step, device) + sum(tensor.nbytes for tensor in held)
    return SimpleNamespace(step=step, calls=calls, first=first, macs=macs, memory=memory)


def contest(
    result: dict[str, Any],
    entries: dict[Entry, Entry],
    group: Group,
    device: torch.device,
    config: dict[str, Any],
    until: float = float("inf"),
) -> None:
    """Let entries take turns, and add a row for each to result.

    What does not fit into memory, does not compile, or is not begun `until` a time.perf_counter()
    goes to result["left_out"], with the reason, and so does what is compared with it.

    Args:
        entries: each with the one that it is compared with, which is an entry too.
    """
    ready: dict[Entry, SimpleNamespace] = {}
    if group.compile:
        prepare_compiler()
    for entry, base in entries.items():
        reason = "no dense model (to compare with)" if base not in (entry, *ready) else ""
        if not reason and time.perf_counter() > until:
            reason = "no time left (run it again: what has been compiled is kept)"
        try:
            if not reason:
                ready[entry] = prepare(entry, group, device, config["min_seconds"])
        except RuntimeError as error:
            memory = isinstance(error, torch.OutOfMemoryError) or "allocate mem" in str(error)
            if not memory and not group.compile:
                raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = "out of memory" if memory else f"does not compile ({first})"
        if reason:
            print(f"  left out: {entry}: {reason}", flush=True)
            result["left_out"].append(group._asdict() | facts(entry) | dict(reason=reason))
        elif group.compile:
            print(f"  compiled in {ready[entry].first:.0f} s: {entry}", flush=True)
    n = 8192 if device.type == "cuda" else 1024  # large enough to show the peak
    a, b = torch.randn(2, n, n, device=device).to(speed.set_precision(group.precision))
    steps = [lambda: torch.mm(a, b), *(found.step for found in ready.values())]
    calls = [speed.warm_up(steps[0], config["min_seconds"] / 5, device)]
    calls += [found.calls for found in ready.values()]
    seconds = speed.take_turns(steps, calls, config["repeats"], device)
    peak = n**3 / seconds[0]
    result["matmul"].append(group._asdict() | dict(macs_per_s=float(np.median(peak))))
    speeds = dict(zip(ready, group.batch_size / seconds[1:], strict=True))
    for (entry, own), taken in zip(speeds.items(), seconds[1:], strict=True):
        found, row = ready[entry], group._asdict() | facts(entry)
        row |= dict(macs_executed=found.macs, memory_bytes=found.memory, first_seconds=found.first)
        row |= dict(compared_with=str(entries[entry]), seconds=[float(f"{s:.6g}") for s in taken])
        share = own * found.macs / peak
        numbers = dict(images_per_s=own, latency_ms=1000 * taken, peak_share=share)
        for name, values in (numbers | dict(ratio=own / speeds[entries[entry]])).items():
            low, row[name], high = np.percentile(values, [25, 50, 75]).tolist()
            row[f"{name}_quartiles"] = [low, high]
        if config["paper"] and not entry.reducer and len(set(row["keep_rate"])) == 1:
            setting = entry.model, row["keep_rate"][0], entry.fusion, entry.img_size
            row["paper"] = paper.cost(*setting) if group.what == "inference" else None
        result["rows"].append(row)


def prepare_compiler() -> None:
    """Let torch.compile keep a form of each model, and its cache outlive the process."""
    from torch._dynamo import config

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache/evit-lab/inductor"))
    torch.compiler.reset()
    config.recompile_limit = config.accumulated_recompile_limit = 4096
