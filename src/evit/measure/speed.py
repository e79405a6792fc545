"""Time and memory of steps: of what is run again and again, such as a forward pass.

Machines are noisy, and their speed drifts. What is to be compared therefore takes turns, round
after round, and is compared within each round.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

Step = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Step, calls: int, device: torch.device) -> float:
    """Seconds of so many calls."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        step()
    synchronize(device)
    return time.perf_counter() - started


def warm_up(step: Step, min_seconds: float, device: torch.device) -> int:
    """How many calls take min_seconds, once the step has been called often enough to be warm."""
    timed(step, 2, device)
    calls = 1
    while (seconds := timed(step, calls, device)) < min_seconds:
        calls = max(calls + 1, min(10 * calls, math.ceil(calls * min_seconds / seconds)))
    return calls


def take_turns(
    steps: Sequence[Step],
    calls: Sequence[int],
    repeats: int,
    device: torch.device,
    advance: Step = lambda: None,
) -> np.ndarray:
    """Seconds of one call, (steps, rounds).

    In each round every step is called calls[i] times in a row; another one begins each round.

    Args:
        advance: called after each turn.
    """
    seconds = np.empty((len(steps), repeats))
    for turn in range(repeats):
        for place in range(len(steps)):
            i = (turn + place) % len(steps)
            seconds[i, turn] = timed(steps[i], calls[i], device) / calls[i]
            advance()
    return seconds


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The quarter, the median and three quarters."""
    low, middle, high = np.percentile(np.asarray(values), [25, 50, 75])
    return float(low), float(middle), float(high)


def matmul_step(dtype: torch.dtype, device: torch.device) -> tuple[Step, int]:
    """A matrix product large enough to show the machine's peak; its multiply-accumulates."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=product), n**3


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes of the tensors that a step makes, at their most: allocated, and not yet freed.

    From CUDA's allocator, or from all allocations of PyTorch's on the CPU. What libraries take for
    themselves is not seen.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's messages about absent GPUs
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = np.cumsum([0] + [size for _, size in changes])
    return int(held.max())
