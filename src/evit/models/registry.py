"""Model names registered with timm, and timm's own models with a reducer."""

from collections.abc import Callable
from typing import Any

import timm
from timm.models import build_model_with_cfg, register_model
from torch import nn

from evit import reducers
from evit.models.lvvit import LVViT
from evit.models.reduced import ReducedViT, check_img_size
from evit.models.vit import reduce
from evit.models.weights import fit_state_dict
from evit.reducers import Reducer

HEADS = dict(tiny=3, small=6, base=12)
DEIT: dict[str, Any] = {k: dict(embed_dim=64 * n, depth=12, num_heads=n) for k, n in HEADS.items()}
LV_VIT: dict[str, dict[str, Any]] = {
    "t": dict(embed_dim=240, depth=12, num_heads=4, skip_lam=1.0),
    "s": dict(embed_dim=384, depth=16, num_heads=6, skip_lam=2.0),
    "m": dict(embed_dim=512, depth=20, num_heads=8, skip_lam=2.0),
}
# Registered name -> default arguments of ReducedViT or LVViT.
NAMES = {f"evit_deit_{size}_patch16": DEIT[size] for size in DEIT}
NAMES |= {f"lvvit_{size}": LV_VIT[size] | dict(keep_rate=1.0) for size in LV_VIT}
NAMES |= {f"evit_lvvit_{size}": LV_VIT[size] for size in LV_VIT}
for _name in "evit_deit_small_patch16", "evit_deit_base_patch16", "evit_lvvit_s", "evit_lvvit_m":
    NAMES[f"dynamic{_name[1:]}"] = NAMES[_name] | dict(reducer="dynamicvit")


def _fit(weights: dict[str, Any], model: Any) -> dict[str, Any]:
    """Fit timm's dense weights to the model; the reducer's parameters stay as initialised."""
    own = {name: w for name, w in model.state_dict().items() if name.startswith("reducer.")}
    return own | fit_state_dict(weights, model)


def _entry(name: str, defaults: dict[str, Any]) -> Callable[..., ReducedViT]:
    def create(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
        args, kind = defaults | kwargs, ReducedViT if "deit" in name else LVViT
        args |= dict(feature_cfg=dict(out_indices=args.pop("out_indices", 3), feature_cls="getter"))
        return build_model_with_cfg(kind, name, pretrained, pretrained_filter_fn=_fit, **args)

    create.__name__, create.__module__ = name, __name__
    create.__doc__ = f"{name}: arguments of evit.EViT or evit.LVViT; by default {defaults}."
    return create


LV_VIT_CFG: Any = dict(num_classes=1000, input_size=(3, 224, 224), fixed_input_size=True)
LV_VIT_CFG |= dict(crop_pct=0.9, interpolation="bicubic", first_conv="patch_embed.conv1")
LV_VIT_CFG |= dict(classifier=("head", "aux_head"))
CFGS: Any = {name: LV_VIT_CFG for name in NAMES if "deit" not in name}
for _size in DEIT:  # DeiT's weights are loaded unchanged
    _cfg = timm.models.get_pretrained_cfg(f"deit_{_size}_patch16_224")
    CFGS |= {f"{name}.fb_in1k": _cfg for name in NAMES if f"deit_{_size}" in name}
default_cfgs = timm.models.generate_default_cfgs(CFGS)
for _name, _defaults in NAMES.items():
    globals()[_name] = register_model(_entry(_name, _defaults))


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Call timm.create_model; an unknown name, no weights, no network become ValueErrors."""
    if kwargs.get("reducer", "") is None:  # timm leaves out what is None
        kwargs |= dict(reducer="evit", keep_rate=1.0)
    try:
        return timm.create_model(model_name, pretrained=pretrained, **kwargs)
    except RuntimeError as error:
        if "Unknown model" in str(error) or "pretrained" in str(error):
            way = "timm.list_models() has the names; checkpoint=PATH loads a file"
            raise ValueError(f"{error}: {way}") from error
        raise
    except Exception as error:  # downloads raise OSError, or httpx's own
        if not pretrained or not (isinstance(error, OSError) or "httpx" in type(error).__module__):
            raise
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        what = f"the pretrained weights of {model_name} cannot be downloaded ({reason})"
        raise ValueError(f"{what}: download them elsewhere and give checkpoint=PATH") from error


def reduced(model_name: str, reducer: str | Reducer | None = "evit", **kwargs: Any) -> ReducedViT:
    """Create a timm model with a token reducer (evit.reduce); reducer=None keeps all tokens."""
    made = reducers.take(kwargs, reducer)
    model = reduce(create_model(model_name, **kwargs), made)
    check_img_size(model.patch_embed)
    return model


@register_model
def reduced_vit(pretrained: bool = False, *, base: str, **kwargs: Any) -> ReducedViT:
    """timm's model `base` with a reducer; timm reloads models made by evit.reduce through this."""
    model = reduced(base, **kwargs)
    if pretrained:
        shape = dict(num_classes=model.num_classes, in_chans=model.patch_embed.proj.in_channels)
        timm.models.load_pretrained(model, **shape)
    return model
