"""Convert any timm VisionTransformer into one that reduces its tokens."""

from collections.abc import Sequence
from typing import Any

from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from evit import reducers
from evit.models.vit import ReducedViT, reduced_class
from evit.reducers import KeepRate, Reducer
from evit.reducers.blocks import ROTATED, ReducedBlock, ReducedEvaBlock


def reduce(
    model: Any,
    name: str | Reducer = "evit",
    keep_rate: KeepRate | None = None,
    *,
    at: Sequence[int] | None = None,
    counts: Sequence[int] | None = None,
    **options: Any,
) -> ReducedViT:
    """Add a token reducer to a timm VisionTransformer or Eva, in place, and return the model.

    Weights are untouched. Prefix tokens (class, distillation, registers) are never reduced.

    Args:
        name: a name in evit.reducers.REDUCERS, or a Reducer.
        keep_rate: share of the image tokens kept at each place; default 0.7.
        at: blocks (0-based) that reduce. Default: a quarter, half and three quarters of the depth,
            or every block if `options` contain the method's own schedule (r, ratio, ...).
        counts: image tokens left after each place, instead of keep_rate.
        **options: options of the reducer.

    Raises:
        ValueError: the reducer, its options or the model are not supported.
    """
    check_model(model)
    given = dict(keep_rate=keep_rate, at=at, counts=counts)
    reducer = reducers.make(name, **given, **options)
    if not hasattr(model, "reducer"):
        built_from = model.__dict__.pop("_model_args", {})
        cfg = dict(getattr(model, "pretrained_cfg", {}))
        model.__class__ = reduced_class(type(model))
        model.built_from = built_from | dict(base=cfg.get("architecture"))
        model.pretrained_cfg = cfg | dict(architecture="reduced_vit")  # in models/registry.py
    model._attach(reducer)
    return model


def reorganize(
    model: Any,
    keep_rate: KeepRate = 0.7,
    fusion: bool = True,
    drop_loc: Sequence[int] | None = None,
) -> ReducedViT:
    """Turn a timm VisionTransformer into an EViT, in place: reduce(model, "evit")."""
    return reduce(model, "evit", keep_rate, at=drop_loc, fusion=fusion)


def check_model(model: Any) -> None:
    """Raise a ValueError unless this is a timm VisionTransformer or Eva with plain blocks."""
    kind = type(model).__name__
    for wrapper, inner in (("module", "DataParallel"), ("_orig_mod", "OptimizedModule")):
        if inner in kind and hasattr(model, wrapper):
            raise ValueError(f"{kind} wraps the model: hand over model.{wrapper}")
    if not isinstance(model, VisionTransformer | Eva):
        children = model.named_children() if isinstance(model, nn.Module) else []
        inside = [name for name, child in children if isinstance(child, VisionTransformer | Eva)]
        way = (
            f"hand over model.{inside[0]}"
            if inside
            else "take one from timm.create_model('vit_...')"
        )
        package = type(model).__module__.split(".")[0]
        raise ValueError(f"{kind} of {package} is not a timm VisionTransformer or Eva: {way}")
    if getattr(model, "rope_mixed", False):
        raise ValueError(f"{kind} has its own rotary positions in each block: not supported")
    for i, block in enumerate(model.blocks):
        if type(block) not in (Block, EvaBlock, ReducedBlock, ReducedEvaBlock):
            name = type(block).__name__
            raise ValueError(f"block {i} of {kind} is a {name}, which is not supported")
        attn: Any = block.attn
        served = type(attn) in (Attention, *ROTATED) and getattr(attn, "gate", None) is None
        if not served or getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
            name = type(attn).__name__
            raise ValueError(f"block {i} of {kind} has {name} with a gate or shared keys")
