"""DynamicViT (arXiv 2106.02034): predictors, not the class token, choose the tokens to keep."""

import itertools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from evit import tokens
from evit.models.attention import project, residual
from evit.models.deit import deit_cfg
from evit.models.lvvit import SIZES, LVViT, own_arguments
from evit.models.vit import EViT, KeepRate
from evit.models.weights import fit_state_dict


class Predictor(nn.Module):
    """Log-probabilities (B, N, 2) of keeping and of dropping each token (the authors' PredictorLG).

    Half of a token's features are its own, half the mean over the tokens that are still kept.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            *(nn.Linear(dim, dim // 2), nn.GELU()),
            *(nn.Linear(dim // 2, dim // 4), nn.GELU()),
            *(nn.Linear(dim // 4, 2), nn.LogSoftmax(-1)),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x_BNC: Tensor, kept_BN: Tensor) -> Tensor:
        own, shared = self.in_conv(x_BNC).chunk(2, -1)
        kept_BN1 = kept_BN[:, :, None].float()
        # In float32, and at least one token: the mean over none would be NaN.
        mean = (shared.float() * kept_BN1).sum(1, keepdim=True) / kept_BN1.sum(
            1, keepdim=True
        ).clamp(1)
        return self.out_conv(torch.cat([own, mean.to(own.dtype).expand_as(own)], -1))


def masked_attention(attn: Any, x_BTC: Tensor, kept_BT: Tensor) -> Tensor:
    """timm's Attention.forward, up to the dropout, where a token sees the kept ones and itself.

    Differentiable in kept_BT (ones and zeros). The softmax is the authors', in float32 whatever the
    precision of the rest.
    """
    T = x_BTC.shape[1]
    q, k, v = project(attn, x_BTC, 0, 3)
    logits = ((q * attn.scale) @ k.transpose(-2, -1)).float()
    seen_BTT = kept_BT[:, None].float().expand(-1, T, -1)
    seen_BTT = seen_BTT + (1 - seen_BTT) * torch.eye(T, device=logits.device)
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * seen_BTT[:, None]
    weight = (weight + 1e-6 / T) / (weight.sum(-1, keepdim=True) + 1e-6)
    out = attn.attn_drop(weight.to(v.dtype)) @ v
    return attn.proj(attn.norm(out.transpose(1, 2).flatten(2)))


def masked_block(block: Any, x_BTC: Tensor, kept_BT: Tensor) -> Tensor:
    """timm's Block.forward with masked_attention."""
    return residual(block, x_BTC, masked_attention(block.attn, block.norm1(x_BTC), kept_BT))


class DynamicViT(EViT):
    """Vision Transformer whose predictors choose the tokens to keep, before the blocks of drop_loc.

    In evaluation tokens are removed: the predictor at location s keeps the best
    int(N * keep_rate ** s) of the N image tokens (with one rate for each, the product of the first
    s). In training none is: decisions are drawn, and later attention is masked (forward_masked).
    Parameter names are those of the published checkpoints.

    Args:
        fusion: accepted, and without effect: DynamicViT drops what it does not keep.
        **kwargs: EViT's.
    """

    # What a dense checkpoint lacks, and fine-tuning from it starts anew.
    new_parts = ("score_predictor",)

    def __init__(self, *args: Any, fusion: bool = False, **kwargs: Any):
        super().__init__(*args, fusion=False, **kwargs)
        self.score_predictor = nn.ModuleList(Predictor(self.embed_dim) for _ in self.drop_loc)

    def set_keep_rate(self, keep_rate: KeepRate) -> None:
        super().set_keep_rate(keep_rate)
        if not all(self.num_kept(self.patch_embed.num_patches)):
            raise ValueError(
                f"keep_rate {keep_rate!r} leaves none of {self.patch_embed.num_patches} tokens "
                f"after {len(self.drop_loc)} predictors: raise it"
            )

    def kept_shares(self) -> list[float]:
        """The share of all image tokens that is kept from each location on."""
        return list(itertools.accumulate(self.keep_rate, operator.mul))

    def num_kept(self, num_patches: int) -> list[int]:
        return [int(num_patches * share) for share in self.kept_shares()]

    def reorganizing_block(
        self, i: int, x_BTC: Tensor, num_kept: int, ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The k best tokens by the predictor, through the block."""
        x_BNC = x_BTC[:, self.num_prefix_tokens :]
        if num_kept < x_BNC.shape[1]:
            predictor = self.score_predictor[self.drop_loc.index(i)]
            score_BN = predictor(x_BNC, torch.ones_like(x_BNC[:, :, 0]))[:, :, 0]
            index_BK = tokens.choose(score_BN, num_kept)
            if self.observer:
                self.observer(score_BN, index_BK)
            x_BTC = tokens.reorganize(x_BTC, score_BN, index_BK, False)
            ids = None if ids is None else tokens.follow(ids, index_BK, False)
        return self.blocks[i](x_BTC), ids

    def forward_masked(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Training: normalised tokens (B, T, C), none removed, and the decisions of each predictor.

        A decision (B, N) is 1 for the tokens that this predictor and all before it keep, drawn by
        Gumbel-softmax with straight-through gradients.
        """
        x = self.embed(images)
        prefix = x.new_ones(len(x), self.num_prefix_tokens)
        kept = x.new_ones(len(x), x.shape[1] - self.num_prefix_tokens)
        decisions: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i in self.drop_loc:
                predictor = self.score_predictor[len(decisions)]
                log_prob = predictor(x[:, self.num_prefix_tokens :], kept)
                kept = kept * F.gumbel_softmax(log_prob.float(), hard=True)[:, :, 0]
                decisions.append(kept)
            if decisions:
                x = self._run(masked_block, block, x, torch.cat([prefix, kept], 1))
            else:
                x = self._run(block, x)
        return self.norm(x), decisions

    def forward(  # type: ignore[override]
        self, x: Tensor, return_kept: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """EViT's; in training, without return_kept, the logits of masked tokens."""
        if self.training and not return_kept:
            return self.forward_head(self.forward_masked(x)[0])
        return super().forward(x, return_kept)


class DynamicLVViT(DynamicViT, LVViT):
    """DynamicViT on LV-ViT."""


def fit_backbone(weights: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """A dense checkpoint's weights with the model's own predictors."""
    own = {name: w for name, w in model.state_dict().items() if name.startswith("score_predictor")}
    return own | fit_state_dict(weights, model)


default_cfgs = generate_default_cfgs(
    {f"dynamicvit_deit_{size}_patch16.fb_in1k": deit_cfg(size) for size in ("small", "base")}
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> DynamicViT:
    return build_model_with_cfg(
        DynamicViT, name, pretrained, pretrained_filter_fn=fit_backbone, **kwargs
    )


@register_model
def dynamicvit_deit_small_patch16(pretrained: bool = False, **kwargs: Any) -> DynamicViT:
    """DynamicViT on DeiT-S (22.8 M parameters); pretrained: DeiT's weights, new predictors."""
    args = dict(embed_dim=384, depth=12, num_heads=6)
    return _create("dynamicvit_deit_small_patch16", pretrained, **args | kwargs)


@register_model
def dynamicvit_deit_base_patch16(pretrained: bool = False, **kwargs: Any) -> DynamicViT:
    """DynamicViT on DeiT-B (89.5 M parameters); pretrained: DeiT's weights, new predictors."""
    args = dict(embed_dim=768, depth=12, num_heads=12)
    return _create("dynamicvit_deit_base_patch16", pretrained, **args | kwargs)


@register_model
def dynamicvit_lvvit_s(pretrained: bool = False, **kwargs: Any) -> DynamicLVViT:
    """DynamicViT on LV-ViT-S (26.9 M parameters), before blocks 4, 8, 12."""
    return DynamicLVViT(**SIZES["s"] | own_arguments("dynamicvit_lvvit_s", pretrained, kwargs))


@register_model
def dynamicvit_lvvit_m(pretrained: bool = False, **kwargs: Any) -> DynamicLVViT:
    """DynamicViT on LV-ViT-M, before blocks 5, 10, 15."""
    return DynamicLVViT(**SIZES["m"] | own_arguments("dynamicvit_lvvit_m", pretrained, kwargs))
