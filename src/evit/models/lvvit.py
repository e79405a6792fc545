"""LV-ViT, dense or with a reducer: convolutional stem, halved residuals, auxiliary head."""

from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from evit.models.reduced import ReducedViT
from evit.reducers.dynamicvit import divergence


class ConvStem(PatchEmbed):
    """Four convolutions to one token per 16 x 16 pixels (TokenLabeling's PatchEmbed4_2)."""

    def __init__(self, *, in_chans: int = 3, embed_dim: int = 384, **kwargs: Any):
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, **kwargs)
        if self.patch_size != (16, 16):
            raise ValueError(f"LV-ViT's stem makes patches of 16 pixels, not {self.patch_size[0]}")
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.proj = nn.Conv2d(64, embed_dim, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        assert tuple(x.shape[-2:]) == self.img_size, (x.shape, self.img_size)
        x = x.contiguous(memory_format=torch.channels_last)  # as convolutions compute
        for conv, bn in (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3):
            x = bn(conv(x)).relu_()
        return self.proj(x).flatten(2).transpose(1, 2)


class Scale(nn.Module):
    """Multiply by a constant, in place of the LayerScale of timm's Block."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class LVViT(ReducedViT):
    """LV-ViT (arXiv 2104.10858) with a token reducer; dense at keep rate 1.

    Logits are head(class token) + 0.5 * (maximum over the remaining tokens of aux_head(token)), in
    training too. skip_lam divides both residual branches; other arguments are ReducedViT's.
    """

    def __init__(self, *args: Any, skip_lam: float = 2.0, **kwargs: Any):
        defaults: dict[str, Any] = dict(embed_layer=ConvStem, mlp_ratio=3.0, qkv_bias=False)
        defaults["norm_layer"] = partial(nn.LayerNorm, eps=1e-5)
        super().__init__(*args, **defaults | kwargs)
        for block in self.blocks:
            block.ls1, block.ls2 = Scale(1 / skip_lam), Scale(1 / skip_lam)
        self.aux_head = self._new_aux_head()

    def _new_aux_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.embed_dim, self.num_classes).to(self.cls_token)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._new_aux_head()

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class token (B, K) and the image tokens (B, N, K)."""
        return super().forward_head(x), self.aux_head(x[:, 1:])

    token_outputs = heads

    def token_distance(self, own: Tensor, teacher: Tensor) -> Tensor:
        return divergence(own, teacher)

    def stem_macs(self, size: tuple[int, int]) -> int:
        names = "conv1", "bn1", "conv2", "bn2", "conv3", "bn3"
        weights = sum(getattr(self.patch_embed, name).weight.numel() for name in names)
        return size[0] // 2 * (size[1] // 2) * weights

    def head_macs(self, num_tokens: int) -> int:
        return (num_tokens * self.embed_dim + 1) * self.num_classes

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or self.num_classes == 0:
            return super().forward_head(x, pre_logits)
        of_class, of_tokens = self.heads(x)
        return of_class + 0.5 * of_tokens.amax(1)
