"""The cost of a model: parameters and multiply-accumulates."""

from bisect import bisect
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_params(model: nn.Module) -> int:
    """Count parameters, frozen ones included."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: Any, img_size: int | tuple | None = None, executed: bool = False) -> int:
    """Count multiply-accumulates per image.

    The default is as in the published tables (torchprofile 0.0.4: matrix products, convolutions,
    elementwise products, affine norms; not softmax, GELU, sorting), and a ValueError for a model
    without a reducer. executed=True: the products of this code, with its shortcuts, by PyTorch.
    """
    size = model.patch_embed.img_size if img_size is None else to_2tuple(img_size)
    if executed:
        was_training, weight = model.training, next(model.parameters())
        image = torch.zeros(1, 3, *size, dtype=weight.dtype, device=weight.device)
        eager = torch.compiler.set_stance("force_eager")  # the counter does not see compiled code
        # The counter fails on views of trainable parameters.
        weights = {name: p.detach() for name, p in model.named_parameters()}
        with torch.no_grad(), eager, FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model.eval(), weights, image)
        model.train(was_training)
        return counter.get_total_flops() // 2
    if not hasattr(model, "reducer"):
        raise ValueError(f"no published count for {type(model).__name__}: give executed=True")
    return _published(model, size)


def match_macs(model: Any, gmacs: float) -> float:
    """Set and return the largest keep rate of at most `gmacs` (1e9 per image), or a ValueError."""

    def cost(rate: float) -> Any:
        try:
            model.set_keep_rate(rate)
            return count_macs(model) / 1e9
        except ValueError:  # the reducer cannot leave so few tokens
            return 0

    rates = [step / 100_000 for step in range(1, 100_001)]
    first, end = bisect(rates, 0, key=cost), bisect(rates, gmacs, key=cost)
    if end <= first or gmacs > cost(1):
        least = f"{cost(rates[first]):.3f}, the least of {model.reducer.name}"
        raise ValueError(f"gmacs must be from {least}, to {cost(1):.3f}, got {gmacs}")
    model.set_keep_rate(rates[end - 1])
    return rates[end - 1]


def _published(model: Any, size: tuple[int, int]) -> int:
    """Count as torchprofile 0.0.4 does on the authors' code, which computes the full attention."""
    dim, heads, prefix = model.embed_dim, model.blocks[0].attn.num_heads, model.num_prefix_tokens
    patch, reducer, lvvit = model.patch_embed.patch_size, model.reducer, hasattr(model, "stem_macs")
    n = size[0] // patch[0] * (size[1] // patch[1])
    macs = n * model.patch_embed.proj.weight.numel() + (prefix + n) * _affine(model.norm_pre)
    macs += model.stem_macs(size) if lvvit else 0
    counts = dict(zip(reducer.at, reducer.kept(n), strict=True))
    for i, block in enumerate(model.blocks):
        k = counts.get(i, n)
        left = k + reducer.extra * (k < n)
        macs += reducer.macs(n, k, dim) if k < n else 0
        if reducer.stage == "input":
            n = left
        attn, t = block.attn, prefix + n
        scaled = t * dim if lvvit else heads * t**2  # LV-ViT scales queries, others the attention
        norms = heads * (_affine(attn.q_norm) + _affine(attn.k_norm)) + _affine(attn.norm)
        scales = ("gamma_1", "gamma_2") if hasattr(block, "gamma_1") else ("ls1", "ls2")  # Eva's
        scale_1, scale_2 = (_affine(getattr(block, name, None)) for name in scales)
        macs += t * (_linear(attn) + dim + norms + scale_1) + 2 * t**2 * dim + scaled
        n = left
        macs += (prefix + n) * (_linear(block.mlp) + dim + scale_2)
    macs += (prefix + n) * _affine(model.norm) + _affine(model.fc_norm)
    classifiers = sum(getattr(model, name, None) is not None for name in ("head", "head_dist"))
    return macs + classifiers * dim * model.num_classes + (model.head_macs(n) if lvvit else 0)


def _linear(module: nn.Module) -> int:
    """Products per token of the linear layers in a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _affine(part: Any) -> int:
    """Products per token of an affine norm or LayerScale (in Eva a tensor): its channels, or 0."""
    weight = getattr(part, "weight", getattr(part, "gamma", part))
    return weight.numel() if isinstance(weight, torch.Tensor) else 0
