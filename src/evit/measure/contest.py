"""Models that take turns on one machine: what each of them costs, beside the dense model."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from evit.measure import steps
from evit.measure.macs import count_macs, count_params
from evit.measure.speed import (
    matmul_step,
    peak_memory,
    quartiles,
    take_turns,
    timed,
    warm_up,
)
from evit.models import DynamicViT, EViT, create_model
from evit.models.timm_vit import reorganized

Report = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A model at one setting. The dense ones are timm's own, or the LV-ViT that keeps all."""

    model: str
    keep_rate: float | tuple[float, ...] = 1.0
    fusion: bool | None = None
    img_size: int = 224
    dense: bool = False

    def __str__(self) -> str:
        rate = "dense" if self.dense else f"keep_rate={self.keep_rate}"
        return f"{self.model} {rate} img_size={self.img_size}"


@dataclass(frozen=True)
class Group:
    """What contestants share, so that they can be compared."""

    what: str
    batch_size: int
    precision: str
    compile: bool | str

    def __str__(self) -> str:
        mode = {False: "eager", True: "torch.compile", "reduce-overhead": "CUDA graphs"}
        return f"{self.what}, batch {self.batch_size}, {self.precision}, {mode[self.compile]}"


def is_own(model: str) -> bool:
    """Whether the name is of a model of this package, which takes keep_rate and fusion."""
    return timm.is_model(model) and timm.model_entrypoint(model).__module__.startswith("evit.")


def dense_entry(model: str, img_size: int) -> Entry:
    """The dense model that a model is compared with."""
    if deit := re.fullmatch(r"(?:evit|dynamicvit)_(deit_\w+_patch16)", model):
        model = f"{deit[1]}_224"
    if lvvit := re.fullmatch(r"(?:evit|dynamicvit)_(lvvit_\w)", model):
        model = lvvit[1]
    return Entry(model, img_size=img_size, dense=True)


def build(entry: Entry) -> nn.Module:
    """The entry's model, with random weights.

    Raises:
        ValueError: there is no such model, or it cannot be served at this setting.
    """
    size: dict[str, Any] = dict(img_size=entry.img_size)
    try:
        if entry.dense:
            return dense_model(entry)
        if is_own(entry.model):
            fusion = entry.fusion is not False
            return create_model(entry.model, keep_rate=entry.keep_rate, fusion=fusion, **size)
        return reorganized(entry.model, entry.keep_rate, bool(entry.fusion), **size)
    except TypeError as error:
        raise ValueError(f"{entry.model}: {error}") from error


@functools.cache
def facts(entry: Entry) -> dict[str, Any]:
    """What the entry is, its parameters and published MACs; no memory is taken for weights.

    Raises:
        ValueError: build's.
    """
    with torch.device("meta"):
        model = build(entry)
        if isinstance(model, VisionTransformer):
            model = build(dataclasses.replace(entry, dense=False))
        params = count_params(model)
        if not isinstance(model, EViT):  # of another kind, which has no published count
            macs = count_macs(model.requires_grad_(False), entry.img_size, executed=True)
            return dataclasses.asdict(entry) | dict(keep_rate=[], params=params, macs=macs)
        macs = count_macs(model)
    fusion = None if isinstance(model, DynamicViT) or entry.keep_rate == 1 else entry.fusion
    return dataclasses.asdict(entry) | dict(
        keep_rate=list(model.keep_rate), fusion=fusion, params=params, macs=macs
    )


def dense_model(entry: Entry) -> nn.Module:
    """timm's model; those that take images of any size are not told one."""
    try:
        return create_model(entry.model, img_size=entry.img_size)
    except TypeError:
        return create_model(entry.model)


class Contestant:
    """A model, ready for its turns.

    Raises:
        ValueError: it does not fit into the device's memory.
    """

    def __init__(self, entry: Entry, group: Group, device: torch.device):
        self.entry, self.group, self.device = entry, group, device
        dtype = steps.PRECISIONS[group.precision]
        training = group.what != "inference"
        self.model = build(entry).to(device).train(training).requires_grad_(training)
        size = (group.batch_size, 3, entry.img_size, entry.img_size)
        self.images = torch.randn(size, device=device)
        if not training:
            self.model.to(dtype)
            self.images = self.images.to(dtype)
            self.macs_executed = count_macs(self.model, entry.img_size, executed=True)
        forward: Any = self.model
        if group.compile:
            mode = group.compile if isinstance(group.compile, str) else None
            forward = torch.compile(self.model, mode=mode, dynamic=False, fullgraph=True)
        if training:
            eager = steps.TrainingStep(self.model, self.model, self.images, dtype)
            self.macs_executed = steps.executed_macs(eager) // group.batch_size
            self.step: Any = steps.TrainingStep(self.model, forward, self.images, dtype)
        else:
            self.step = steps.inference_step(forward, self.images)

    def prepare(self, min_seconds: float) -> None:
        """Compile and warm up; how long it takes, how many calls a turn has, the memory."""
        self.first_seconds = timed(self.step, 1, self.device)
        self.calls = warm_up(self.step, min_seconds, self.device)
        self.memory = None
        if self.group.compile != "reduce-overhead":  # a graph's memory is its own, and not seen
            self.memory = self.held() + peak_memory(self.step, self.device)

    def held(self) -> int:
        """Bytes of weights, images and optimizer state; gradients are thrown away before."""
        self.model.zero_grad()
        state = self.step.state() if isinstance(self.step, steps.TrainingStep) else []
        tensors = (*self.model.parameters(), *self.model.buffers(), self.images, *state)
        return steps.nbytes(tensors)


def contest(
    entries: dict[Entry, Entry],
    group: Group,
    device: torch.device,
    repeats: int,
    min_seconds: float,
    report: Report,
) -> tuple[list[dict[str, Any]], float]:
    """Let entries take turns.

    Args:
        entries: each with the one that it is compared with, which is an entry too.
        report: is told what was done, after each turn.

    Returns:
        One row for each entry, and the multiply-accumulates per second of a large matrix product,
        which takes its turns too.

    Raises:
        ValueError: a model does not fit into memory.
    """
    with steps.float32_products(group.precision), many_compiled(len(entries)):
        contestants = []
        for entry in entries:
            try:
                contestant = Contestant(entry, group, device)
                contestant.prepare(min_seconds)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{entry} does not fit into memory at batch_size {group.batch_size}: "
                    f"make it smaller"
                ) from error
            contestants.append(contestant)
            report(f"warm: {entry}")
        matmul, matmul_macs = matmul_step(steps.PRECISIONS[group.precision], device)
        seconds = take_turns(
            [matmul, *(contestant.step for contestant in contestants)],
            [warm_up(matmul, min_seconds / 5, device), *(c.calls for c in contestants)],
            repeats,
            device,
            lambda: report(f"{repeats} rounds"),
        )
    speed = dict(zip(entries, group.batch_size / seconds[1:], strict=True))
    peak = matmul_macs / seconds[0]
    rows: list[dict[str, Any]] = []
    for c in contestants:
        images_per_s = speed[c.entry]
        rows.append(
            vars(group)
            | facts(c.entry)
            | dict(macs_executed=c.macs_executed, memory_bytes=c.memory)
            | spread("images_per_s", images_per_s)
            | spread("latency_ms", 1000 * group.batch_size / images_per_s)
            | spread("ratio", images_per_s / speed[entries[c.entry]])
            | spread("peak_share", images_per_s * c.macs_executed / peak)
            | dict(compared_with=str(entries[c.entry]), first_seconds=c.first_seconds)
            | dict(calls=c.calls, seconds=[float(f"{s:.6g}") for s in seconds[1:][len(rows)]])
        )
    return rows, quartiles(peak)[1]


def spread(name: str, values: np.ndarray) -> dict[str, Any]:
    """The median over the rounds, and the quartiles beside it."""
    low, median, high = quartiles(values)
    return {name: median, f"{name}_quartiles": [low, high]}


def many_compiled(count: int) -> Any:
    """torch.compile keeps so many forms of one class, rather than fall back on eager silently."""
    from torch._dynamo import config

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache/evit-lab/inductor"))
    torch.compiler.reset()
    limits: dict[str, Any] = dict(
        recompile_limit=8 * count + 8, accumulated_recompile_limit=64 * count + 256
    )
    return config.patch(**limits)
