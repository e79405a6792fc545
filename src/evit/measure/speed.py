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
PRECISIONS = dict(fp32=torch.float32, tf32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


def timed(step: Step, calls: int, device: torch.device) -> float:
    """Seconds that this many calls take."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(calls):
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
    """Seconds of one call, (steps, rounds).

    In each round every step is called calls[i] times in a row; each round begins with another step.
    """
    seconds = np.empty((len(steps), repeats))
    for turn in range(repeats):
        for place in range(len(steps)):
            i = (turn + place) % len(steps)
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
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    profiler: Any = profile.profiler
    events = profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.cumsum([0] + [size for _, size in changes]).max())


def set_precision(precision: str) -> torch.dtype:
    """Multiply float32 matrices in TF32 from now on, or exactly; the dtype of the precision."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return PRECISIONS[precision]


def inference_step(forward: Callable[[Tensor], Any], images: Tensor) -> Step:
    """A forward pass without gradients."""

    @torch.no_grad()
    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        forward(images)

    return step


def training_step(
    model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, dtype: torch.dtype
) -> Step:
    """One step of AdamW on images (B, 3, H, W); in autocast below float32.

    Args:
        forward: the model, or its compiled form.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=images.is_cuda or None)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    low = dtype != torch.float32

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype if low else None, enabled=low):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step
