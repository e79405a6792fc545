"""timm's VisionTransformer and Eva with a token reducer: forward passes, feature maps, pickling."""

import bisect
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evit import reducers
from evit.reducers import KeepRate, Reducer, Reduction
from evit.reducers.blocks import ReducedBlock, ReducedEvaBlock, Step
from evit.reducers.tokens import Module, moved, put_back

Encoded = tuple[Tensor, list[Reduction]]
# Heads that read the prefix tokens only, if these are pooled: the last block skips the others.
HEADS = VisionTransformer.forward_head, VisionTransformerDistilled.forward_head, Eva.forward_head


class PatchConv2d(nn.Conv2d):
    """Non-overlapping convolution (B, C, H, W) to (B, embed_dim, H / p, W / q), on a GPU as one
    matrix product: the same sum in another order. cuDNN's takes ten times as long on an H200."""

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input) if input.is_cuda else super().forward(input)

    def product(self, input: Tensor) -> Tensor:
        (p, q), (H, W) = self.kernel_size, input.shape[2:]
        x = input[:, :, : H // p * p, : W // q * q].unflatten(3, (-1, q)).unflatten(2, (-1, p))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Reduced(Module):
    """Mixin that adds a token reducer to a timm Vision Transformer."""

    kind: Any = None  # the timm class that this one extends
    built_from: dict[str, Any] = {}  # the arguments of timm.create_model
    block_class: Any = ReducedBlock
    drop_loc = property(lambda self: self.reducer.at)
    fusion = property(lambda self: getattr(self.reducer, "fusion", False))

    def _attach(self, reducer: Reducer) -> None:
        if type(self.patch_drop) not in (nn.Identity, type(None)):
            raise ValueError("patch_drop_rate drops patches at random: set it to 0, or keep_rate")
        for block in self.blocks:
            block.__class__ = self.block_class
        proj: Any = getattr(self.patch_embed, "proj", None)
        tiles = type(proj) is nn.Conv2d and proj.kernel_size == proj.stride
        if tiles and (proj.groups, proj.padding, proj.dilation) == (1, (0, 0), (1, 1)):
            proj.__class__ = PatchConv2d
        self.reducer: Any = reducer.attach(self).to(next(self.blocks.parameters()))

    @property
    def _model_args(self) -> dict[str, Any]:
        """Arguments that timm writes into config.json beside the weights, to rebuild the model."""
        config = self.reducer.config()
        own = dict(reducer=self.reducer.name, drop_loc=config.pop("at")) | config
        return {k: v for k, v in self.built_from.items() if k != "keep_rate"} | own

    @_model_args.setter
    def _model_args(self, arguments: dict[str, Any]) -> None:
        self.built_from = arguments

    def set_keep_rate(self, keep_rate: KeepRate) -> None:
        """Use keep_rate, one number or one per entry of drop_loc, from the next forward pass on."""
        self.reducer.set_keep_rate(keep_rate)

    keep_rate = property(lambda self: self.reducer.keep_rate, set_keep_rate)

    def tokens_per_block(self) -> list[int]:
        """Number of image tokens in the MLP of each block (a fused token counts as one)."""
        n, at = self.patch_embed.num_patches, self.drop_loc
        left = [n, *self.reducer.counts(n)]
        return [left[bisect.bisect(at, i)] for i in range(len(self.blocks))]

    def embed(self, images: Tensor, swapped: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, T, C) that enter the first block; for MixToken,
        patches with swapped (N,) true come from the batch in reverse."""
        x = self.patch_embed(images)
        x = self._pos_embed(x if swapped is None else torch.where(swapped[:, None], x.flip(0), x))
        return self.norm_pre(x[0] if isinstance(x, tuple) else x)  # Eva's come with positions

    def patch_ids(self, x: Tensor) -> Tensor:
        """Ids (B, N) of the patches behind embedded tokens (B, T, C)."""
        n = x.shape[1] - self.num_prefix_tokens
        return torch.arange(n, device=x.device).expand(x.shape[0], -1)

    def rotary(self, num_patches: int) -> Tensor | None:
        """Rotary positions (1, 1, N, 2 D) for the blocks, or None if the model has none."""
        rope: Any = getattr(self, "rope", None)
        if rope is None:
            return None
        if not self.dynamic_img_size and hasattr(rope, "feat_shape"):
            return rope.get_embed()[None, None]
        grid = self.patch_embed.grid_size
        if grid[0] * grid[1] != num_patches:  # another image size; such images are square
            grid = (math.isqrt(num_patches),) * 2
        return rope.get_embed(shape=grid)[None, None]

    def encode(
        self, x: Tensor, start: int = 0, stop: Any = None, prefix: bool = False, states: Any = None
    ) -> Encoded:
        """Run embedded tokens (not reduced yet) through the blocks start to stop - 1, to tokens
        (B, T', C), and the reductions (none for places that keep all tokens).
        prefix: the last block returns the prefix tokens only, unless it reduces.
        states: a list to extend, for each block, by its reduction (or None) and its tokens."""
        n, P = x.shape[1] - self.num_prefix_tokens, self.num_prefix_tokens
        kept = dict(zip(self.drop_loc, enumerate(self.reducer.kept(n)), strict=True))
        last, rope, sizes = len(self.blocks) - 1, self.rotary(n), None
        found: list[Reduction] = []
        for i in range(start, len(self.blocks) if stop is None else stop):
            place, num_kept = kept.get(i, (0, n))
            bias = self.reducer.key_bias(sizes, x.dtype)
            step = Step(P) if prefix and i == last else None
            if num_kept < n:
                step = Step(P, self.reducer, place, num_kept, sizes, self.cls_token is not None)
            x = self.run(self.blocks[i], x, attn_mask=bias, step=step, rope=rope)
            if reduction := step and step.reduction:
                found.append(reduction)
                sizes, n, rope = reduction.sizes_BT, reduction.num_left, reduction.positions(rope)
            if states is not None:
                states.append((reduction, x))
        return x, found

    def run(self, block: Any, x: Tensor, **given: Any) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x, use_reentrant=False, **given)
        return block(x, **given)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens (B, T, C) of images (B, 3, H, W)."""
        return self.norm(self.encode(self.embed(x))[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        attn_mask: None = None,
    ) -> Any:
        """timm's forward_intermediates at any keep rate: each patch has the token it went into, or
        its state from before the block that dropped it."""
        if attn_mask is not None:
            raise ValueError("attn_mask is not supported: tokens are removed")
        assert output_fmt in ("NCHW", "NLC"), output_fmt
        take, last = feature_take_indices(len(self.blocks), indices)
        states: list[Any] = []
        size, x, P = x.shape[-2:], self.embed(x), self.num_prefix_tokens
        self.encode(x, stop=last + 1 if stop_early else None, states=states)
        placed = list(put_back(x, states, P))
        chosen = [self.norm(placed[i]) if norm else placed[i] for i in take]
        found: list[Any] = [tokens[:, P:] for tokens in chosen]
        if output_fmt == "NCHW":
            found = [self.as_grid(tokens, size) for tokens in found]
        if P and return_prefix_tokens:
            found = list(zip(found, [tokens[:, :P] for tokens in chosen], strict=True))
        return found if intermediates_only else (self.norm(placed[-1]), found)

    def as_grid(self, tokens: Tensor, size: Any) -> Tensor:
        return tokens.mT.unflatten(2, self.patch_embed.dynamic_feat_size(tuple(size))).contiguous()

    def forward(
        self,
        x: Tensor,
        return_kept: bool = False,
        return_source: bool = False,
        return_map: bool = False,
    ) -> Any:
        """Logits (B, num_classes) of images (B, 3, H, W), and what else is requested.

        return_kept: add one int64 tensor (B, k) per reduction: ids of the kept patches in the
        original grid, row by row from the top left; -1 is a fused token.
        return_source: add int64 (B, N): the final token that contains each patch (0 is the class
        token); -1 if it was dropped.
        return_map: add (B, C, H, W): that token, normalised; of a dropped patch its last state."""
        size, x, P = x.shape[-2:], self.embed(x), self.num_prefix_tokens
        more = return_kept or return_source or return_map
        if self.reducer.masked and self.training and not more:
            return self.forward_head(self.norm(self.reducer.masked_features(self, x)[0]))
        states: list[Any] | None = [] if return_map else None
        logits, found = self.classify(x, states=states)
        if not more:
            return logits
        ids = place = self.patch_ids(x)
        n, kept, left = ids.shape[1], [], iter(found)
        for k in self.reducer.kept(n):
            if k < n:
                reduction = next(left)
                ids, place = reduction.ids(ids), moved(reduction, place, n)
                n = reduction.num_left
            kept.append(ids[:, :k])
        results = [logits, kept] if return_kept else [logits]
        if return_source:
            results.append(torch.where(place >= 0, place + P, place))
        if states is not None:
            *_, last = put_back(x, states, P)
            results.append(self.as_grid(self.norm(last)[:, P:], size))
        return tuple(results)

    def classify(self, x: Tensor, start: int = 0, states: Any = None) -> Encoded:
        """Logits, and reductions, of tokens that have passed the blocks before `start`."""
        own = type(self).forward_head in HEADS
        alone = own and states is None and self.global_pool == "token"
        x, found = self.encode(x, start, prefix=alone, states=states)
        return self.logits(self.norm(x), found), found

    def logits(self, x: Tensor, found: list[Reduction]) -> Tensor:
        """Logits of normalised tokens; their mean counts each for the patches in it."""
        sizes_BT, P = found[-1].sizes_BT if found else None, self.num_prefix_tokens
        if self.global_pool == "avg" and sizes_BT is not None and sizes_BT.shape[1] == x.shape[1]:
            sizes = sizes_BT[:, P:, None]
            share = (sizes * (sizes.shape[1] / sizes.sum(1, keepdim=True))).to(x.dtype)
            x = torch.cat([x[:, :P], x[:, P:] * share], 1)
        return self.forward_head(x)

    def token_outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits, and the output per image token (B, N, ...) that distillation compares."""
        return self.forward_head(x), x[:, self.num_prefix_tokens :]

    def token_distance(self, own: Tensor, teacher: Tensor) -> Tensor:
        return (own.float() - teacher.float()).square().mean(-1)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by timm's class, as the class made for it has no importable name."""
        how: Any = super().__reduce_ex__(protocol)
        return how if self.kind is None else (blank, (self.kind,), *how[2:])


def check_img_size(embed: Any) -> None:
    """Raise a ValueError unless the image size is a multiple of the patch size."""
    for size, patch in zip(embed.img_size, embed.patch_size, strict=True):
        if size < patch or size % patch:
            lower = max(size // patch, 1) * patch
            way = f"take {lower} or {lower + patch}"
            raise ValueError(f"img_size {size} is not a multiple of the patch size {patch}: {way}")


class ReducedViT(Reduced, VisionTransformer):  # type: ignore[misc]
    """Vision Transformer with a token reducer: EViT by default (arXiv 2202.07800).

    Parameter names are those of timm's VisionTransformer; a reducer's begin with "reducer.".

    reducer: a name in evit.reducers.REDUCERS, or a Reducer, as it is in the model then; None: EViT
    at keep rate 1, the dense model.
    kwargs: keep_rate, drop_loc (`at` of Reducer), fusion (EViT's) and other options of the reducer,
    and arguments of VisionTransformer. ValueError: they are invalid."""

    def __init__(self, *args: Any, reducer: str | Reducer | None = "evit", **kwargs: Any):
        made = reducers.take(kwargs, reducer)
        super().__init__(*args, **kwargs)
        check_img_size(self.patch_embed)
        self._attach(made)


class ReducedEva(Reduced, Eva):  # type: ignore[misc]
    """timm's Eva (EVA-02, DINOv3) with a token reducer; tokens keep their rotary positions."""

    block_class = ReducedEvaBlock


@functools.cache
def reduced_class(kind: Any) -> Any:
    """Class that combines ReducedViT or ReducedEva with one of timm's classes."""
    base: Any = ReducedEva if issubclass(kind, Eva) else ReducedViT
    own = kind in base.__bases__
    return base if own else type(f"Reduced{kind.__name__}", (base, kind), dict(kind=kind))


def blank(kind: Any) -> Reduced:
    """Empty reduced model of a timm class, to unpickle into."""
    return object.__new__(reduced_class(kind))
