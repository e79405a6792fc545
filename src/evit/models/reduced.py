"""A timm Vision Transformer with a token reducer: forward passes, feature maps, pickling."""

import bisect
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evit.reducers import KeepRate, Reducer, Reduction
from evit.reducers.blocks import ReducedBlock, Step
from evit.reducers.tokens import put_back, source, survivors


class PatchConv2d(nn.Conv2d):
    """Non-overlapping convolution (B, C, H, W) to (B, embed_dim, H / p, W / q), on a GPU as one
    matrix product: the same sum in another order. cuDNN's takes ten times as long on an H200."""

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input) if input.is_cuda else super().forward(input)

    def product(self, input: Tensor) -> Tensor:
        """forward() as a matrix product."""
        (p, q), (H, W) = self.kernel_size, input.shape[2:]
        x = input[:, :, : H // p * p, : W // q * q].unflatten(3, (-1, q)).unflatten(2, (-1, p))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def of_reducer(name: str, doc: str) -> Any:
    """Property that reads and sets an attribute of the model's reducer; False if it has none."""

    def change(model: Any, value: Any) -> None:
        model.set_keep_rate(value) if name == "keep_rate" else setattr(model.reducer, name, value)

    return property(lambda model: getattr(model.reducer, name, False), change, doc=doc)


class Reduced(nn.Module):
    """Mixin that adds a token reducer to a timm Vision Transformer."""

    kind: Any = None  # the timm class that this one extends
    built_from: dict[str, Any] = {}  # the arguments of timm.create_model
    block_class: Any = ReducedBlock
    blank: Any  # makes an empty model of a timm class, to unpickle into
    embed: Any  # images (B, 3, H, W) to the tokens (B, T, C) that enter the first block
    head_reads_prefix: Any  # whether the head reads prefix tokens only: the last block skips others
    reducer: Any  # the method, its places and keep rates
    blocks: Any  # from here on timm's
    patch_embed: Any
    norm: Any
    num_prefix_tokens: int
    global_pool: Any
    cls_token: Any
    forward_head: Any
    grad_checkpointing: bool

    def _attach(self, reducer: Reducer) -> None:
        if type(self.patch_drop) not in (nn.Identity, type(None)):
            raise ValueError("patch_drop_rate drops patches at random: set it to 0, or keep_rate")
        for block in self.blocks:
            block.__class__ = self.block_class
        proj = getattr(self.patch_embed, "proj", None)
        if type(proj) is nn.Conv2d and proj.kernel_size == proj.stride and proj.groups == 1:
            if proj.padding == (0, 0) and proj.dilation == (1, 1):
                proj.__class__ = PatchConv2d
        self.reducer: Any = reducer.attach(self).to(next(self.blocks.parameters()))

    drop_loc = of_reducer("at", "The blocks that reduce.")
    keep_rate = of_reducer("keep_rate", "The keep rate of each reduction; setting it checks it.")
    fusion = of_reducer("fusion", "EViT: whether the other tokens are fused into one.")
    selection = of_reducer("selection", "EViT: the tokens to keep.")

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

    def num_kept(self, num_patches: int) -> list[int]:
        """Number of image tokens that each reduction keeps."""
        return self.reducer.kept(num_patches)

    def tokens_per_block(self) -> list[int]:
        """Number of image tokens in the MLP of each block (a fused token counts as one)."""
        n, at = self.patch_embed.num_patches, self.drop_loc
        left = [n, *self.reducer.counts(n)]
        return [left[bisect.bisect(at, i)] for i in range(len(self.blocks))]

    def patch_ids(self, x: Tensor) -> Tensor:
        """Ids (B, N) of the patches behind embedded tokens (B, T, C)."""
        ids_N = torch.arange(x.shape[1] - self.num_prefix_tokens, device=x.device)
        return ids_N.expand(x.shape[0], -1)

    def rotary(self, num_patches: int) -> Tensor | None:
        """Rotary positions (1, 1, N, 2 D) for the blocks, or None if the model has none."""
        return None

    def encode(
        self,
        x: Tensor,
        start: int = 0,
        stop: int | None = None,
        prefix_only: bool = False,
        states: list[Any] | None = None,
    ) -> tuple[Tensor, list[Reduction]]:
        """Run embedded tokens (not reduced yet) through the blocks start to stop - 1.

        prefix_only: the last block returns the prefix tokens only, unless it reduces.
        states: a list to extend, for each block, by its reduction (if any) and its tokens.
        Returns: tokens (B, T', C), and the reductions (none for places that keep all tokens).
        """
        n, P = x.shape[1] - self.num_prefix_tokens, self.num_prefix_tokens
        kept = dict(zip(self.drop_loc, enumerate(self.reducer.kept(n)), strict=True))
        last, found, rope = len(self.blocks) - 1, [], self.rotary(n)
        sizes: Tensor | None = None
        for i in range(start, len(self.blocks) if stop is None else stop):
            place, num_kept = kept.get(i, (0, n))
            bias = self.reducer.key_bias(sizes, x.dtype)
            step = Step(P) if prefix_only and i == last else None
            if num_kept < n:
                class_token = self.cls_token is not None
                step = Step(P, self.reducer, place, num_kept, sizes, bias, class_token)
            x = self.run(self.blocks[i], x, attn_mask=bias, step=step, rope=rope)
            new = [] if step is None or step.reduction is None else [step.reduction]
            for reduction in new:
                sizes, n = reduction.sizes_BT, num_kept + self.reducer.extra
                rope = reduction.positions(rope)
            found += new
            if states is not None:
                states += [*new, x]
        return x, found

    def run(self, block: Any, x: Tensor, **given: Any) -> Tensor:
        """Call block(x) with the arguments that are not None, with gradient checkpointing if on."""
        given = {name: value for name, value in given.items() if value is not None}
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x, use_reentrant=False, **given)
        return block(x, **given)

    def forward_features(self, x: Tensor, return_kept: bool = False) -> Any:  # type: ignore[override]
        """Normalised tokens (B, T, C); with return_kept, also the ids of the surviving patches."""
        x = self.embed(x)
        ids = self.patch_ids(x)
        x, found = self.encode(x)
        x = self.norm(x)
        return (x, survivors(found, self.reducer, ids)) if return_kept else x

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's forward_intermediates at any keep rate: each patch has the token it went into.

        A dropped patch has its state from before the block that dropped it.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal are not supported: tokens are removed")
        assert output_fmt in ("NCHW", "NLC"), output_fmt
        take, last = feature_take_indices(len(self.blocks), indices)
        size, x = x.shape[-2:], self.embed(x)
        states: list[Any] = [x]
        self.encode(x, stop=last + 1 if stop_early else None, states=states)
        P = self.num_prefix_tokens
        placed = list(put_back(states, P))
        chosen = [self.norm(placed[i]) if norm else placed[i] for i in take]
        maps: list[Any] = [tokens[:, P:] for tokens in chosen]
        if output_fmt == "NCHW":
            maps = [self.as_grid(tokens, size) for tokens in maps]
        prefix = [tokens[:, :P] for tokens in chosen] if P and return_prefix_tokens else None
        if output_dict:
            result: dict[str, Any] = dict(image_intermediates=maps)
            if prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(placed[-1])
            return result
        found = list(zip(maps, prefix, strict=True)) if prefix else maps
        return found if intermediates_only else (self.norm(placed[-1]), found)

    def as_grid(self, tokens: Tensor, size: Any) -> Tensor:
        """Reshape patches (B, N, C) of images of this size to a map (B, C, H, W)."""
        H, W = self.patch_embed.dynamic_feat_size(tuple(size))
        return tokens.reshape(tokens.shape[0], H, W, -1).permute(0, 3, 1, 2).contiguous()

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        return_kept: bool = False,
        return_source: bool = False,
        return_map: bool = False,
    ) -> Any:
        """Logits (B, num_classes) of images (B, 3, H, W), and what else is requested.

        Args:
            return_kept: add one int64 tensor (B, k) per reduction: ids of the kept patches in the
                original grid, row by row from the top left; -1 is a fused token.
            return_source: add int64 (B, N): the final token that contains each patch (0 is the
                class token); -1 if it was dropped.
            return_map: add (B, C, H, W): for each patch the final normalised token that contains
                it; for a dropped patch its state from before it was dropped.
        """
        size, x = x.shape[-2:], self.embed(x)
        more = return_kept or return_source or return_map
        if self.reducer.masked and self.training and not more:
            return self.forward_head(self.norm(self.reducer.masked_features(self, x)[0]))
        states: list[Any] | None = [x] if return_map else None
        logits, found = self.classify(x, states=states)
        results: list[Any] = [logits]
        if return_kept:
            results.append(survivors(found, self.reducer, self.patch_ids(x)))
        if return_source:
            results.append(source(found, self.patch_ids(x), self.num_prefix_tokens))
        if states is not None:
            *_, last = put_back(states, self.num_prefix_tokens)
            results.append(self.as_grid(self.norm(last)[:, self.num_prefix_tokens :], size))
        return tuple(results) if more else logits

    def classify(
        self, x: Tensor, start: int = 0, states: list[Any] | None = None
    ) -> tuple[Tensor, list[Reduction]]:
        """Logits, and reductions, of tokens that have passed the blocks before `start`."""
        prefix_only = self.head_reads_prefix and states is None
        x, found = self.encode(x, start, prefix_only=prefix_only, states=states)
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
        """Distance between two models' token outputs, (B, N)."""
        return (own.float() - teacher.float()).square().mean(-1)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by timm's class, as the class made for it has no importable name."""
        how: Any = super().__reduce_ex__(protocol)
        return how if self.kind is None else (self.blank, (self.kind,), *how[2:])
