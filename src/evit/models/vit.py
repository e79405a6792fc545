"""timm's VisionTransformer and Eva with a token reducer."""

import math
from collections.abc import Sequence
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from evit import reducers
from evit.models.patches import check_img_size
from evit.models.reduced import Reduced
from evit.reducers import KeepRate, Reducer
from evit.reducers.blocks import ReducedEvaBlock


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


def DynamicViT(*args: Any, **kwargs: Any) -> ReducedViT:
    """ReducedViT with the reducer "dynamicvit"."""
    return ReducedViT(*args, reducer="dynamicvit", **kwargs)
