"""timm's Vision Transformers by name, as EViTs."""

from collections.abc import Sequence
from typing import Any

from evit.models.pretrained import create_model
from evit.models.vit import EViT, KeepRate, check_img_size, reorganize


def reorganized(
    model_name: str,
    keep_rate: KeepRate = 0.7,
    fusion: bool = True,
    drop_loc: Sequence[int] | None = None,
    **kwargs: Any,
) -> EViT:
    """A timm model, turned into its EViT by evit.reorganize.

    Raises:
        ValueError: timm has no such model, evit.reorganize cannot serve it, or its patches do not
            tile img_size.
    """
    model = reorganize(create_model(model_name, **kwargs), keep_rate, fusion, drop_loc)
    check_img_size(model.patch_embed.img_size, model.patch_embed.patch_size)
    return model
