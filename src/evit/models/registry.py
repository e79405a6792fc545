"""Model names registered with timm; `evit.reduce`, and which models and images it serves."""

import functools
from typing import Any

import timm
from timm.models import build_model_with_cfg, register_model
from timm.models.eva import Eva, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from evit import reducers
from evit.models.lvvit import LVViT
from evit.models.reduced import ReducedViT, check_img_size, reduced_class
from evit.models.weights import fit_state_dict
from evit.reducers import KeepRate, Reducer
from evit.reducers.blocks import ATTENTIONS, ReducedBlock, ReducedEvaBlock

BLOCKS = Block, EvaBlock, ReducedBlock, ReducedEvaBlock  # the kinds that are served
EViT = ReducedViT
DynamicViT: Any = functools.partial(ReducedViT, reducer="dynamicvit")
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


def _entry(name: str, defaults: dict[str, Any]) -> Any:
    def fit(weights: Any, model: Any) -> dict[str, Any]:
        """Fit timm's dense weights to the model; the reducer's parameters stay as initialised."""
        own = {name: w for name, w in model.state_dict().items() if name.startswith("reducer.")}
        return own | fit_state_dict(weights, model)

    def create(pretrained: bool = False, **kwargs: Any) -> ReducedViT:
        args, kind = defaults | kwargs, ReducedViT if "deit" in name else LVViT
        args |= dict(feature_cfg=dict(out_indices=args.pop("out_indices", 3), feature_cls="getter"))
        return build_model_with_cfg(kind, name, pretrained, pretrained_filter_fn=fit, **args)

    create.__name__, create.__module__ = name, __name__
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


def reduce(
    model: Any, name: str | Reducer = "evit", keep_rate: KeepRate | None = None, **options: Any
) -> ReducedViT:
    """Add a token reducer to a timm VisionTransformer or Eva, in place, and return the model.

    Weights are untouched. Prefix tokens (class, distillation, registers) are never reduced.

    name: a name in evit.reducers.REDUCERS, or a Reducer.
    keep_rate: share of the image tokens kept at each place; default 0.7.
    options: at (the blocks that reduce) and counts (the tokens left after each, instead of
    keep_rate), as in evit.reducers.Reducer, and the method's own.
    ValueError: the reducer, its options or the model are not supported."""
    check_model(model)
    reducer = reducers.make(name, keep_rate=keep_rate, **options)
    if not hasattr(model, "reducer"):
        built_from = model.__dict__.pop("_model_args", {})
        cfg = dict(getattr(model, "pretrained_cfg", {}))
        model.__class__ = reduced_class(model.__class__)
        model.built_from = built_from | dict(base=cfg.get("architecture"))
        model.pretrained_cfg = cfg | dict(architecture="reduced_vit")  # in models/registry.py
    model._attach(reducer)
    return model


def reorganize(model: Any, keep_rate: Any = 0.7, fusion: bool = True, drop_loc: Any = None) -> Any:
    """Turn a timm VisionTransformer into an EViT, in place."""
    return reduce(model, "evit", keep_rate, at=drop_loc, fusion=fusion)


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
