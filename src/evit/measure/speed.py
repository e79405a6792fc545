"""Time and memory of a step, such as a forward pass or an optimizer step.

Machines are noisy and their speed drifts, so steps that are compared take turns, round after round,
and are compared within each round.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], object]


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
    calls = 1
    while (seconds := timed(step, calls, device)) < min_seconds:
        calls = max(calls + 1, min(10 * calls, math.ceil(calls * min_seconds / seconds)))
    return calls


def take_turns(
    steps: Sequence[Step], calls: Sequence[int], repeats: int, device: torch.device
) -> np.ndarray:
    """Seconds of one call, (steps, rounds); in each round another step is first."""
    seconds, n = np.empty((len(steps), repeats)), len(steps)
    for turn in range(repeats):
        for i in (*range(turn % n, n), *range(turn % n)):
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
    """A forward pass without gradients; of a model in training mode a step of AdamW.

    Args:
        forward: the model, or its compiled form.
        dtype: of a training step's autocast, if any.
    """
    if not model.training:
        return torch.no_grad()(lambda: forward(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=images.is_cuda or None)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step
