"""`evit.reduce` adds a token reducer to a timm model in place; which models are served."""

import functools
from typing import Any

from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer

from evit import reducers
from evit.models.reduced import ReducedViT, reduced_class
from evit.reducers import KeepRate, Reducer
from evit.reducers.blocks import ATTENTIONS, ReducedBlock, ReducedEvaBlock

BLOCKS = Block, EvaBlock, ReducedBlock, ReducedEvaBlock  # the kinds that are served
EViT = ReducedViT
DynamicViT: Any = functools.partial(ReducedViT, reducer="dynamicvit")


def reduce(
    model: Any, name: str | Reducer = "evit", keep_rate: KeepRate | None = None, **options: Any
) -> ReducedViT:
    """Add a token reducer to a timm VisionTransformer or Eva, in place, and return the model.

    Weights are untouched. Prefix tokens (class, distillation, registers) are never reduced.

    name: a name in evit.reducers.REDUCERS, or a Reducer.
    keep_rate: share of the image tokens kept at each place; default 0.7.
    options: at (the blocks that reduce) and counts (the tokens left after each, instead of
    keep_rate), as in evit.reducers.Reducer, and the method's own.
    ValueError: the reducer, its options or the model are not supported.
    """
    check_model(model)
    reducer = reducers.make(name, keep_rate=keep_rate, **options)
    if not hasattr(model, "reducer"):
        built_from = model.__dict__.pop("_model_args", {})
        cfg = dict(getattr(model, "pretrained_cfg", {}))
        model.__class__ = reduced_class(type(model))
        model.built_from = built_from | dict(base=cfg.get("architecture"))
        model.pretrained_cfg = cfg | dict(architecture="reduced_vit")  # in models/registry.py
    model._attach(reducer)
    return model


def check_model(model: Any) -> None:
    """Raise a ValueError unless this is a timm VisionTransformer or Eva with plain blocks."""
    kind = type(model).__name__
    if not isinstance(model, VisionTransformer | Eva):
        kind += f" of {type(model).__module__.split('.')[0]}"
        way = "use timm.create_model, or the wrapped model.module, model._orig_mod or model.model"
        raise ValueError(f"{kind} is not a timm VisionTransformer or Eva: {way}")
    if getattr(model, "rope_mixed", False):
        raise ValueError(f"{kind} has its own rotary positions in each block: not supported")
    for i, block in enumerate(model.blocks):
        attn: Any = getattr(block, "attn", None)
        what = f"block {i} of {kind}"
        if type(block) not in BLOCKS or type(attn) not in ATTENTIONS:
            raise ValueError(f"{what} is a {type(block).__name__}, which is not supported")
        shares = getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads
        if shares or getattr(attn, "gate", None) is not None:
            raise ValueError(f"{what} has an attention with a gate or shared keys")


def check_images(model: Any, img_size: int) -> None:
    """Raise a ValueError unless the model takes square RGB images of img_size."""
    embed = getattr(model, "patch_embed", None)
    first = getattr(embed, "conv1", getattr(embed, "proj", None))  # LV-ViT's stem, or the patches
    if (channels := getattr(first, "in_channels", 3)) != 3:
        raise ValueError(f"model.in_chans={channels}: images are read as RGB, gray ones too: 3")
    size = getattr(embed, "img_size", None)
    if size not in (None, (img_size, img_size)):
        raise ValueError(f"model.img_size={list(size)}: images are squares, of img_size={img_size}")
