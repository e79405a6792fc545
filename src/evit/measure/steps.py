"""What is timed: a forward pass, or one step of training."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evit.measure.speed import Step

PRECISIONS = dict(fp32=torch.float32, tf32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Products of float32 numbers by TF32 where that is the precision, exactly otherwise."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def inference_step(model: Callable[[Tensor], Any], images: Tensor) -> Step:
    """A forward pass without gradients, of a model in evaluation mode."""

    @torch.no_grad()
    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        model(images)

    return step


class TrainingStep:
    """One optimizer step: forward, cross-entropy, backward and AdamW; by autocast below float32.

    Args:
        forward: calls the model; it may be its compiled form.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        dtype: torch.dtype,
    ):
        self.forward, self.images, self.dtype = forward, images, dtype
        self.labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def __call__(self) -> None:
        self.learn(self.images, self.labels)

    def learn(self, images: Tensor, labels: Tensor) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad()
        low = self.dtype != torch.float32
        with torch.autocast(images.device.type, self.dtype if low else None, enabled=low):
            loss = F.cross_entropy(self.forward(images), labels)
        loss.backward()
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        """What AdamW keeps."""
        values = (v for state in self.optimizer.state.values() for v in state.values())
        return [value for value in values if isinstance(value, Tensor)]


def executed_macs(step: Step) -> int:
    """Multiply-accumulates that a step computes, backward included, counted by PyTorch."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() // 2


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
