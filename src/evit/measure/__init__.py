"""The cost of a model: parameters and multiply-accumulates."""

import bisect
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

STEPS = 100_000  # resolution of the keep rates that match_macs tries


def count_params(model: nn.Module) -> int:
    """Count parameters, frozen ones included."""
    return sum(p.numel() for p in model.parameters())


def count_macs(
    model: Any, img_size: int | tuple[int, int] | None = None, executed: bool = False
) -> int:
    """Count multiply-accumulates per image.

    The default counts the published algorithm as the published tables do (torchprofile 0.0.4:
    matrix products, convolutions, elementwise products, affine norms; not softmax, GELU, sorting).
    executed=True counts the products that this code computes, with its shortcuts, by PyTorch.

    Raises:
        ValueError: the published convention is not defined for this model.
    """
    size = model.patch_embed.img_size if img_size is None else to_2tuple(img_size)
    if executed:
        was_training, weight = model.training, next(model.parameters())
        image = torch.zeros(1, 3, *size, dtype=weight.dtype, device=weight.device)
        eager = torch.compiler.set_stance("force_eager")  # the counter does not see compiled code
        learning = [p for p in model.parameters() if p.requires_grad]
        for p in learning:  # the counter fails on views of trainable parameters
            p.requires_grad_(False)
        with torch.no_grad(), eager, FlopCounterMode(display=False) as counter:
            model.eval()(image)
        model.train(was_training)
        for p in learning:
            p.requires_grad_(True)
        return counter.get_total_flops() // 2
    if not hasattr(model, "reducer"):
        name = type(model).__name__
        raise ValueError(f"no published count for {name}: evit.reduce it, or executed=True")
    return _published(model, size)


def match_macs(model: Any, gmacs: float) -> float:
    """Set and return the largest keep rate that costs at most `gmacs` (1e9 per image).

    Raises:
        ValueError: the budget is above the dense model's cost or below the smallest possible one.
    """

    def macs(step: int) -> int:
        try:
            model.set_keep_rate(step / STEPS)
            return count_macs(model)
        except ValueError:  # the reducer cannot leave so few tokens
            return 0

    steps = bisect.bisect(range(1, STEPS + 1), gmacs * 1e9, key=macs)
    if not 0 < gmacs * 1e9 <= macs(STEPS) or not steps or not macs(steps):
        least = macs(1 + bisect.bisect(range(1, STEPS), 0, key=macs))
        raise ValueError(
            f"gmacs must be from {least / 1e9:.3f}, the least of {model.reducer.name}, to "
            f"{macs(STEPS) / 1e9:.3f}, which keep rate 1 costs, got {gmacs}"
        )
    return steps / STEPS


def _published(model: Any, size: tuple[int, int]) -> int:
    """Count as torchprofile 0.0.4 does on the authors' code, which computes the full attention."""
    dim, heads, prefix = model.embed_dim, model.blocks[0].attn.num_heads, model.num_prefix_tokens
    patch, reducer = model.patch_embed.patch_size, model.reducer
    n = size[0] // patch[0] * (size[1] // patch[1])
    macs = n * model.patch_embed.proj.weight.numel() + (prefix + n) * _affine(model.norm_pre)
    lvvit = hasattr(model, "stem_macs")
    if lvvit:
        macs += model.stem_macs(size)
    counts = dict(zip(reducer.at, reducer.kept(n), strict=True))
    for i, block in enumerate(model.blocks):
        k = counts.get(i, n)
        left = k + reducer.extra * (k < n)
        if k < n:
            macs += reducer.macs(n, k, dim)
        if reducer.stage == "input":
            n = left
        attn, t = block.attn, prefix + n
        scaled = t * dim if lvvit else heads * t**2  # LV-ViT scales queries, others the attention
        norms = heads * (_affine(attn.q_norm) + _affine(attn.k_norm)) + _affine(attn.norm)
        macs += t * _linear(attn) + 2 * t**2 * dim + scaled
        macs += t * (dim + norms + _scale(block, 1))
        n = left
        macs += (prefix + n) * (_linear(block.mlp) + dim + _scale(block, 2))
    macs += (prefix + n) * _affine(model.norm) + _affine(model.fc_norm)
    classifiers = sum(getattr(model, name, None) is not None for name in ("head", "head_dist"))
    macs += classifiers * dim * model.num_classes
    return macs + (model.head_macs(n) if lvvit else 0)


def _linear(module: nn.Module) -> int:
    """Count multiply-accumulates per token of the linear layers in a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _scale(block: Any, number: int) -> int:
    """Products per token of a block's LayerScale: a module in timm's Block, a tensor in Eva's."""
    gamma = getattr(block, f"gamma_{number}", None)
    return _affine(getattr(block, f"ls{number}", None)) if gamma is None else gamma.numel()


def _affine(module: nn.Module | None) -> int:
    """Products per token of an affine norm or LayerScale: one per channel; otherwise 0."""
    weight = getattr(module, "weight", getattr(module, "gamma", None))
    return 0 if weight is None else weight.numel()
