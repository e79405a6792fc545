"""EViT over timm's VisionTransformer: the same parameters, fewer tokens."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evit import tokens
from evit.models.attention import mix, prefix_block, project, residual, use_inplace_gelu

KeepRate = float | Sequence[float]


def per_reorganization(keep_rate: KeepRate, count: int) -> tuple[float, ...]:
    """keep_rate, a number or one for each reorganization, as `count` floats in (0, 1]."""
    rates = list(keep_rate) if isinstance(keep_rate, Sequence) else [keep_rate] * count
    numbers = all(isinstance(r, Real) and not isinstance(r, bool) for r in rates)
    if isinstance(keep_rate, str) or not numbers or not all(0 < r <= 1 for r in rates):
        raise ValueError(
            f"keep_rate must be in (0, 1], one number or one for each reorganization, "
            f"got {keep_rate!r}: 0.7 is the paper's main setting, 1 keeps every token"
        )
    if len(rates) != count:
        raise ValueError(
            f"keep_rate {list(rates)} has {len(rates)} entries for {count} reorganizations: "
            f"give one number, or {count}"
        )
    return tuple(float(r) for r in rates)


def check_img_size(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> None:
    """Refuse an image size that whole patches do not tile."""
    for size, patch in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True):
        if size < patch or size % patch:
            lower = max(size // patch, 1) * patch
            raise ValueError(
                f"img_size {size} is not a multiple of the patch size {patch}: "
                f"take {lower} or {lower + patch}"
            )


class EViT(VisionTransformer):
    """Vision Transformer that keeps the tokens its class token attends to (arXiv 2202.07800).

    Parameters, and their names, are those of timm's VisionTransformer.

    Args:
        keep_rate: share of the image tokens kept at a reorganization, in (0, 1]; one number, or
            one for each entry of drop_loc. 1 is the dense model.
        drop_loc: blocks (0-based) that reorganize; default: a quarter, half and three quarters of
            the depth, which is 3, 6, 9 for DeiT.
        fusion: fuse the tokens that are not kept into one; otherwise they are dropped.
        **kwargs: VisionTransformer's.

    Attributes:
        selection: which tokens are kept: the "attentive" ones; or, to compare with, "random" or
            "inattentive" ones.
        observer: where it is not None, called at each reorganization with the scores (B, N) of the
            image tokens and the indices (B, K) of those that are kept.

    Raises:
        ValueError: keep_rate, drop_loc or img_size cannot be served.
    """

    selection = "attentive"
    observer: Callable[[Tensor, Tensor], None] | None = None

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *args: Any,
        keep_rate: KeepRate = 0.7,
        drop_loc: Sequence[int] | None = None,
        fusion: bool = True,
        **kwargs: Any,
    ):
        check_img_size(img_size, patch_size)
        super().__init__(img_size, patch_size, *args, **kwargs)
        self._init_reorganization(keep_rate, drop_loc, fusion)

    def _init_reorganization(
        self, keep_rate: KeepRate, drop_loc: Sequence[int] | None, fusion: bool
    ) -> None:
        if not self.has_class_token:
            raise ValueError("class_token=False leaves nothing that could score the image tokens")
        if not isinstance(self.patch_drop, nn.Identity):
            raise ValueError("patch_drop_rate drops patches at random: set it to 0, or keep_rate")
        depth = len(self.blocks)
        if drop_loc is None:
            drop_loc = [depth * quarter // 4 for quarter in (1, 2, 3)]
        self.drop_loc = tuple(drop_loc)
        if list(self.drop_loc) != sorted(set(self.drop_loc) & set(range(depth))):
            raise ValueError(
                f"drop_loc must be ascending block numbers from 0 to {depth - 1}, "
                f"got {list(self.drop_loc)}"
            )
        for block in self.blocks:
            use_inplace_gelu(block)
        self.fusion = fusion
        self.set_keep_rate(keep_rate)

    def set_keep_rate(self, keep_rate: KeepRate) -> None:
        """Use keep_rate, one number or one for each of drop_loc, from the next forward on."""
        self.keep_rate = per_reorganization(keep_rate, len(self.drop_loc))

    def num_kept(self, num_patches: int) -> list[int]:
        """How many of an image's tokens each reorganization keeps."""
        n, counts = num_patches, []
        for rate in self.keep_rate:
            counts.append(tokens.num_kept(n, rate))
            n = n if counts[-1] == n else counts[-1] + self.fusion
        return counts

    def tokens_per_block(self) -> list[int]:
        """Image tokens that enter the MLP of each block (a fused token counts as one)."""
        n, counts = self.patch_embed.num_patches, []
        kept = dict(zip(self.drop_loc, self.num_kept(n), strict=True))
        for i in range(len(self.blocks)):
            n = kept[i] + self.fusion if kept.get(i, n) < n else n
            counts.append(n)
        return counts

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, T, C) that enter the first block."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    def patch_ids(self, x: Tensor) -> Tensor:
        """Ids (B, N) of the patches behind embedded tokens (B, T, C)."""
        return torch.arange(x.shape[1] - self.num_prefix_tokens, device=x.device).expand(
            x.shape[0], -1
        )

    def reorganizing_block(
        self, i: int, x_BTC: Tensor, num_kept: int, ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """timm's Block.forward with the reorganization between its attention and its MLP.

        Equal to the published order of things, with less of it: the projection of the attention's
        output is linear, so it can follow the fusion; without fusion, only the tokens that are kept
        ask (queries), while all are asked.
        """
        block: Any = self.blocks[i]
        attn, num_prefix, n = block.attn, self.num_prefix_tokens, x_BTC.shape[1]
        if num_kept == n - num_prefix:
            return block(x_BTC), ids
        y_BTC = block.norm1(x_BTC)
        if self.fusion:
            q, k, v = project(attn, y_BTC, 0, 3)
        else:
            (q,), (k, v) = project(attn, y_BTC[:, :1], 0, 1), project(attn, y_BTC, 1, 3)
        score_BN = tokens.class_attention(q, k, num_prefix, attn.scale)
        index_BK = tokens.choose(score_BN, num_kept, self.selection)
        if self.observer:
            self.observer(score_BN, index_BK)
        if self.fusion:
            out = attn.proj(tokens.reorganize(mix(attn, q, k, v), score_BN, index_BK, True))
            if attn.proj.bias is not None:  # counted once for each token that was fused
                weight_B1 = score_BN.scatter(1, index_BK, 0.0).sum(1, keepdim=True)
                out[:, -1].add_((weight_B1 - 1).to(out.dtype) * attn.proj.bias)
        else:
            (q,) = project(attn, tokens.reorganize(y_BTC, score_BN, index_BK, False), 0, 1)
            out = attn.proj(mix(attn, q, k, v))
        x_BTC = tokens.reorganize(x_BTC, score_BN, index_BK, self.fusion)
        ids = None if ids is None else tokens.follow(ids, index_BK, self.fusion)
        return residual(block, x_BTC, out), ids

    @property
    def head_reads_prefix(self) -> bool:
        """Whether the classifier reads prefix tokens alone: no other need leave the last block."""
        heads = (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)
        return self.global_pool == "token" and type(self).forward_head in heads

    def encode(
        self,
        x: Tensor,
        ids: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
        prefix_only: bool = False,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Embedded tokens, none of them dropped yet, through the blocks start to stop - 1.

        With prefix_only the last block returns the prefix tokens alone.

        Returns: tokens (B, T', C); with ids, also those of the tokens that are left, and for each
        reorganization those of the tokens that it kept.
        """
        counts = self.num_kept(x.shape[1] - self.num_prefix_tokens)
        kept_at, kept = dict(zip(self.drop_loc, counts, strict=True)), []
        for i in range(start, len(self.blocks) if stop is None else stop):
            if i not in kept_at:
                if prefix_only and i == len(self.blocks) - 1:
                    x = self._run(prefix_block, self.blocks[i], x, self.num_prefix_tokens)
                else:
                    x = self._run(self.blocks[i], x)
                continue
            x, ids = self._run(self.reorganizing_block, i, x, kept_at[i], ids)
            if ids is not None:
                kept.append(ids[:, : kept_at[i]])
        return x, ids, kept

    def forward_features(  # type: ignore[override]
        self, x: Tensor, return_kept: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Normalised tokens (B, T, C); with return_kept, also the ids of the surviving patches."""
        x = self.embed(x)
        x, _, kept = self.encode(x, self.patch_ids(x) if return_kept else None)
        x = self.norm(x)
        return (x, kept) if return_kept else x

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """timm's, at keep rate 1: the tokens that are left at another rate make no feature map.

        Raises:
            ValueError: the keep rate is below 1.
        """
        if min(self.keep_rate, default=1.0) < 1:
            raise ValueError(
                f"there is no feature map of the tokens left at keep rate {self.keep_rate}: call "
                f"set_keep_rate(1) before forward_intermediates"
            )
        return super().forward_intermediates(*args, **kwargs)

    def _run(self, function, *args):
        if self.grad_checkpointing and self.training:
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def forward(  # type: ignore[override]
        self, x: Tensor, return_kept: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits (B, num_classes) of images (B, 3, H, W).

        With return_kept also one int64 tensor (B, k) per reorganization: the ids of the surviving
        patches in the original grid, row by row from the top left; -1 is a surviving fused token.
        """
        x = self.embed(x)
        ids = self.patch_ids(x) if return_kept else None
        logits, kept = self.classify(x, ids)
        return (logits, kept) if return_kept else logits

    def classify(
        self, x: Tensor, ids: Tensor | None = None, start: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits of embedded tokens that have been through the blocks before `start`."""
        x, _, kept = self.encode(x, ids, start, prefix_only=self.head_reads_prefix)
        return self.forward_head(self.norm(x)), kept


def reorganize(
    model: Any,
    keep_rate: KeepRate = 0.7,
    fusion: bool = True,
    drop_loc: Sequence[int] | None = None,
) -> EViT:
    """Turn a timm VisionTransformer into its EViT: in place, weights untouched; and return it.

    Prefix tokens (class, distillation, registers) are never dropped and do not count. drop_loc
    defaults to a quarter, half and three quarters of the depth.

    Raises:
        ValueError: the model has no class token, or blocks of another kind than timm's Block.
    """
    kind = type(model)
    if not isinstance(model, VisionTransformer) or not model.has_class_token:
        raise ValueError(
            f"{kind.__name__} has no class token that could score the image tokens: take a timm "
            f"VisionTransformer that has one"
        )
    for i, block in enumerate(model.blocks):
        if type(block) is not Block:
            name = type(block).__name__
            raise ValueError(f"block {i} of {kind.__name__} is a {name}, which cannot be served")
        if type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
            name = type(block.attn).__name__
            raise ValueError(f"block {i} of {kind.__name__} attends by {name}, or with a gate")
    if isinstance(model, EViT) and kind.num_kept is not EViT.num_kept:
        raise ValueError(f"{kind.__name__} chooses its tokens by predictors: set_keep_rate instead")
    if not isinstance(model, EViT):
        bases = (EViT,) if kind is VisionTransformer else (EViT, kind)
        model.__class__ = EViT if len(bases) == 1 else type(f"EViT{kind.__name__}", bases, {})
    reorganized: Any = model
    reorganized._init_reorganization(keep_rate, drop_loc, fusion)
    return reorganized
