"""Let models take turns on one machine: what each of them costs, beside the dense model."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evit.measure import speed
from evit.measure.entries import Entry, build, facts
from evit.measure.macs import count_macs
from evit.models.weights import load_checkpoint, read_state_dict
from evit.report import paper
from evit.report.benchmark import MODES

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


class Contestant:
    """An entry's model, ready for its turns: compiled and warm, its memory and MACs measured.

    A turn takes min_seconds or more.
    """

    def __init__(self, entry: Entry, group: Group, device: torch.device, min_seconds: float):
        dtype, training = speed.set_precision(group.precision), group.what != "inference"
        model = build(entry)
        if entry.model.endswith(".ckpt") and not entry.dense:
            load_checkpoint(model, read_state_dict(entry.model))
        model.to(device).train(training).requires_grad_(training)
        images = torch.randn(group.batch_size, 3, entry.img_size, entry.img_size, device=device)
        if training:
            eager = speed.training_step(model, model, images, dtype)
            self.macs_executed = speed.executed_macs(eager) // group.batch_size
        else:
            model, images = model.to(dtype), images.to(dtype)
            self.macs_executed = count_macs(model, entry.img_size, executed=True)
        forward: Any = model
        if group.compile:
            mode = group.compile if isinstance(group.compile, str) else None
            forward = torch.compile(model, mode=mode, dynamic=False, fullgraph=True)
        self.step: speed.Step = (
            speed.training_step(model, forward, images, dtype)
            if training
            else speed.inference_step(forward, images)
        )
        self.first_seconds = speed.timed(self.step, 1, device)
        self.calls = speed.warm_up(self.step, min_seconds, device)
        self.memory_bytes = None
        if group.compile != "reduce-overhead":  # the memory of a CUDA graph is not seen
            model.zero_grad()
            copies = 3 if training else 1  # AdamW keeps two numbers for each weight
            held = [*[*model.parameters()] * copies, *model.buffers(), images]
            peak = speed.peak_memory(self.step, device)
            self.memory_bytes = peak + sum(tensor.nbytes for tensor in held)


def contest(
    result: dict[str, Any],
    entries: dict[Entry, Entry],
    group: Group,
    device: torch.device,
    config: dict[str, Any],
    until: float = float("inf"),
) -> None:
    """Let entries take turns, and add a row for each to result.

    What does not fit into memory, does not compile, or on a GPU has not been prepared `until` a
    time.perf_counter() goes to result["left_out"], with the reason, and what is compared with it.

    Args:
        entries: each with the one that it is compared with, which is an entry too.
    """
    ready: dict[Entry, Contestant] = {}
    repeats, min_seconds = config["repeats"], config["min_seconds"]
    dtype = speed.set_precision(group.precision)
    with many_compiled(len(entries)):
        for i, (entry, base) in enumerate(entries.items()):
            state = "compiling" if group.compile else "warming up"
            report(f"{group}: {state} {i + 1}/{len(entries)}, {entry}")
            reason = ""
            if base not in (entry, *ready):
                reason = "no dense model (to compare with)"
            elif device.type == "cuda" and time.perf_counter() > until:
                reason = "no time left (run it again: what has been compiled is kept)"
            try:
                if not reason:
                    ready[entry] = Contestant(entry, group, device, min_seconds)
                    continue
            except RuntimeError as error:
                memory = isinstance(error, torch.OutOfMemoryError) or "allocate mem" in str(error)
                if not memory and not group.compile:
                    raise
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                reason = "out of memory" if memory else f"does not compile ({first})"
                say(f"  left out: {entry}: {reason}")
            result["left_out"].append(vars(group) | facts(entry) | dict(reason=reason))
        report(f"{group}: {repeats} rounds of {len(ready)} models")
        matmul, matmul_macs = speed.matmul_step(dtype, device)
        calls = [speed.warm_up(matmul, min_seconds / 5, device), *(c.calls for c in ready.values())]
        steps = [matmul, *(contestant.step for contestant in ready.values())]
        seconds = speed.take_turns(steps, calls, repeats, device)
    peak = matmul_macs / seconds[0]
    result["matmul"].append(vars(group) | dict(macs_per_s=float(np.median(peak))))
    speeds = dict(zip(ready, group.batch_size / seconds[1:], strict=True))
    for (entry, c), taken in zip(ready.items(), seconds[1:], strict=True):
        row = vars(group) | facts(entry)
        row |= dict(macs_executed=c.macs_executed, memory_bytes=c.memory_bytes)
        row |= spread("images_per_s", speeds[entry])
        row |= spread("latency_ms", 1000 * taken)
        row |= spread("ratio", speeds[entry] / speeds[entries[entry]])
        row |= spread("peak_share", speeds[entry] * c.macs_executed / peak)
        row |= dict(compared_with=str(entries[entry]), first_seconds=c.first_seconds)
        row |= dict(calls=c.calls, seconds=[float(f"{s:.6g}") for s in taken])
        if config["paper"]:
            alike = group.what == "inference" and len(set(row["keep_rate"])) == 1
            setting = (row["model"], *row["keep_rate"][:1], row["fusion"], entry.img_size)
            row["paper"] = paper.cost(*setting) if alike and not entry.reducer else None
        result["rows"].append(row)


def spread(name: str, values: np.ndarray) -> dict[str, Any]:
    """The median over the rounds, and the quartiles beside it."""
    low, median, high = speed.quartiles(values)
    return {name: median, f"{name}_quartiles": [low, high]}


def many_compiled(count: int) -> Any:
    """Let torch.compile keep a form for each model, where it would fall back on eager silently."""
    from torch._dynamo import config

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache/evit-lab/inductor"))
    torch.compiler.reset()
    limits: Any = dict(recompile_limit=8 * count + 8, accumulated_recompile_limit=64 * count + 256)
    return config.patch(**limits)


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
