"""EViT on DeiT, in timm's registry."""

from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)

from evit.models.vit import EViT
from evit.models.weights import fit_state_dict


def _create_evit(name: str, pretrained: bool, **kwargs: Any) -> EViT:
    return build_model_with_cfg(
        EViT, name, pretrained, pretrained_filter_fn=fit_state_dict, **kwargs
    )


def deit_cfg(size: str) -> dict[str, Any]:
    """timm's configuration of the DeiT weights, which EViT loads unchanged."""
    cfg = get_pretrained_cfg(f"deit_{size}_patch16_224")
    assert cfg is not None
    return cfg.to_dict()


default_cfgs = generate_default_cfgs(
    {f"evit_deit_{size}_patch16.fb_in1k": deit_cfg(size) for size in ("tiny", "small", "base")}
)


@register_model
def evit_deit_tiny_patch16(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT on DeiT-T (5.7 M parameters)."""
    args = dict(embed_dim=192, depth=12, num_heads=3)
    return _create_evit("evit_deit_tiny_patch16", pretrained, **args | kwargs)


@register_model
def evit_deit_small_patch16(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT on DeiT-S (22.1 M parameters), the paper's main model."""
    args = dict(embed_dim=384, depth=12, num_heads=6)
    return _create_evit("evit_deit_small_patch16", pretrained, **args | kwargs)


@register_model
def evit_deit_base_patch16(pretrained: bool = False, **kwargs: Any) -> EViT:
    """EViT on DeiT-B (86.6 M parameters)."""
    args = dict(embed_dim=768, depth=12, num_heads=12)
    return _create_evit("evit_deit_base_patch16", pretrained, **args | kwargs)
