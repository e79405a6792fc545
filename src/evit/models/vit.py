"""timm's VisionTransformer and Eva with a token reducer; `reduce` converts a model in place."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from evit import reducers
from evit.models.reduced import Reduced
from evit.reducers import KeepRate, Reducer
from evit.reducers.blocks import ATTENTIONS, ReducedBlock, ReducedEvaBlock


def check_img_size(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Raise a ValueError unless the image size is a multiple of the patch size."""
    for size, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True):
        if size < patch or size % patch:
            lower = max(size // patch, 1) * patch
            way = f"take {lower} or {lower + patch}"
            raise ValueError(f"img_size {size} is not a multiple of the patch size {patch}: {way}")


def check_images(model: Any, img_size: int) -> None:
    """Raise a ValueError unless the model takes square RGB images of img_size."""
    embed = getattr(model, "patch_embed", None)
    first = getattr(embed, "conv1", getattr(embed, "proj", None))  # LV-ViT's stem, or the patches
    if (channels := getattr(first, "in_channels", 3)) != 3:
        raise ValueError(f"model.in_chans={channels}: images are read as RGB, gray ones too: 3")
    size = getattr(embed, "img_size", None)
    if size not in (None, (img_size, img_size)):
        raise ValueError(f"model.img_size={list(size)}: images are squares, of img_size={img_size}")


class ReducedViT(Reduced, VisionTransformer):  # type: ignore[misc]
    """Vision Transformer with a token reducer: EViT by default (arXiv 2202.07800).

    Parameter names are those of timm's VisionTransformer; a reducer's begin with "reducer.".

    Args:
        reducer: a name in evit.reducers.REDUCERS, or a Reducer; None: EViT at keep rate 1, the
            dense model.
        keep_rate: share of the image tokens kept at each place, in (0, 1]; one number, or one per
            entry of drop_loc. 1 is the dense model.
        drop_loc: blocks (0-based) that reduce; default: a quarter, half and three quarters of the
            depth, which is 3, 6, 9 for DeiT.
        fusion: EViT only: fuse the other tokens into one; False drops them.
        **kwargs: other options of the reducer, and arguments of VisionTransformer.

    Attributes:
        reducer: the method, its places and keep rates.

    Raises:
        ValueError: the reducer, keep_rate, drop_loc or img_size is invalid.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *args: Any,
        reducer: str | Reducer | None = "evit",
        keep_rate: KeepRate | None = None,
        drop_loc: Sequence[int] | None = None,
        fusion: bool | None = None,
        **kwargs: Any,
    ):
        check_img_size(img_size, patch_size)
        made = reducers.take(kwargs, reducer, keep_rate, drop_loc, fusion)
        super().__init__(img_size, patch_size, *args, **kwargs)
        self._attach(made)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, T, C) that enter the first block."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    @property
    def head_reads_prefix(self) -> bool:
        """Whether the classifier reads prefix tokens only (see Reduced)."""
        heads = (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)
        return self.global_pool == "token" and type(self).forward_head in heads


class ReducedEva(Reduced, Eva):  # type: ignore[misc]
    """timm's Eva (EVA-02, DINOv3) with a token reducer; tokens keep their rotary positions."""

    block_class = ReducedEvaBlock

    def embed(self, images: Tensor) -> Tensor:
        return self.norm_pre(self._pos_embed(self.patch_embed(images))[0])

    def rotary(self, num_patches: int) -> Tensor | None:
        if self.rope is None:
            return None
        grid = self.patch_embed.grid_size
        if grid[0] * grid[1] != num_patches:  # another image size; such images are square
            grid = (math.isqrt(num_patches),) * 2
            assert grid[0] ** 2 == num_patches, num_patches
        fixed = not self.dynamic_img_size and hasattr(self.rope, "feat_shape")
        rope: Any = self.rope
        return (rope.get_embed() if fixed else rope.get_embed(shape=grid))[None, None]

    @property
    def head_reads_prefix(self) -> bool:
        return self.global_pool == "token" and self.attn_pool is None


BLOCKS = Block, EvaBlock, ReducedBlock, ReducedEvaBlock  # the kinds that are served
CLASSES: dict[Any, Any] = {VisionTransformer: ReducedViT, Eva: ReducedEva}


def reduced_class(kind: Any) -> Any:
    """Class that combines ReducedViT or ReducedEva with one of timm's classes."""
    if kind not in CLASSES:
        base = ReducedEva if issubclass(kind, Eva) else ReducedViT
        CLASSES[kind] = type(f"Reduced{kind.__name__}", (base, kind), dict(kind=kind))
    return CLASSES[kind]


def blank(kind: Any) -> Reduced:
    """Empty reduced model of a timm class, to unpickle into."""
    made = reduced_class(kind)
    return made.__new__(made)


Reduced.blank = staticmethod(blank)
EViT = ReducedViT


DynamicViT: Any = functools.partial(ReducedViT, reducer="dynamicvit")


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
    if not isinstance(model, VisionTransformer | Eva):
        raise ValueError(
            f"{kind} of {type(model).__module__.split('.')[0]} is not a timm VisionTransformer or "
            f"Eva: make one with timm.create_model('vit_...'), or hand over the model that this "
            f"wraps, such as model.module, model._orig_mod or model.model"
        )
    if getattr(model, "rope_mixed", False):
        raise ValueError(f"{kind} has its own rotary positions in each block: not supported")
    for i, block in enumerate(model.blocks):
        attn: Any = getattr(block, "attn", None)
        if type(block) not in BLOCKS or type(attn) not in ATTENTIONS:
            what = f"a {type(block).__name__}"
            raise ValueError(f"block {i} of {kind} is {what}, which is not supported")
        shares = getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads
        if shares or getattr(attn, "gate", None) is not None:
            raise ValueError(f"block {i} of {kind} has an attention with a gate or shared keys")


class Cascade(nn.Module):
    """Classify at the first keep rate, and again at the next if the confidence is too low.

    Confidence is the largest probability. Logits of an image do not depend on its batch.

    Args:
        model: a reduced model, trained for all of these rates; its keep rate is changed.
        rates: keep rates from low to high; each one number, or one per place.
        thresholds: confidence below which an image goes to the next rate: one for each step.

    Attributes:
        images: number of images that each rate has classified so far.
    """

    def __init__(self, model: Any, rates: Sequence[Any], thresholds: float | Sequence[float]):
        super().__init__()
        wanted = [thresholds] if isinstance(thresholds, int | float) else list(thresholds)
        if len(rates) < 2 or len(wanted) != len(rates) - 1:
            needed = "two keep rates or more and a threshold between each two"
            raise ValueError(f"a cascade has {needed}: got {list(rates)} and {wanted}")
        self.model, self.rates, self.thresholds = model, list(rates), wanted
        self.images = [0] * len(rates)

    def _at(self, step: int, images: Tensor) -> Tensor:
        self.model.set_keep_rate(self.rates[step])
        self.images[step] += len(images)
        return self.model(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W)."""
        logits = self._at(0, images)
        for step, threshold in enumerate(self.thresholds, 1):
            unsure = (logits.softmax(1).amax(1) < threshold).nonzero().flatten()
            if not len(unsure):
                break
            logits = logits.index_copy(0, unsure, self._at(step, images[unsure]).to(logits.dtype))
        return logits

    def macs(self, costs: Sequence[float]) -> float:
        """Mean cost per image so far, from the cost of each rate."""
        return sum(c * n for c, n in zip(costs, self.images, strict=True)) / max(self.images[0], 1)
