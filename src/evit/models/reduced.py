"""What a timm Vision Transformer becomes with a token reducer in it."""

import bisect
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evit.models import follow
from evit.models.patches import PatchConv2d
from evit.reducers import KeepRate, Reducer, Reduction
from evit.reducers.blocks import ReducedBlock, Step


def of_reducer(name: str, doc: str) -> Any:
    """An attribute of a model's reducer as one of the model; False where it has none."""

    def change(model: Any, value: Any) -> None:
        model.set_keep_rate(value) if name == "keep_rate" else setattr(model.reducer, name, value)

    return property(lambda model: getattr(model.reducer, name, False), change, doc=doc)


class Reduced(nn.Module):
    """What a timm Vision Transformer becomes with a token reducer in it.

    Attributes:
        reducer: where and how tokens are reduced; it holds the keep rates.
    """

    kind: Any = None  # timm's class that this one was made of
    built_from: dict[str, Any] = {}  # the arguments of timm.create_model
    block_class: Any = ReducedBlock
    blank: Any  # of a class of timm, the model to unpickle into
    reducer: Any
    blocks: Any
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
    fusion = of_reducer("fusion", "EViT's: whether tokens that are not kept are fused into one.")
    selection = of_reducer("selection", "EViT's: which tokens are kept.")

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm writes into config.json beside the weights, to make the model again."""
        config = self.reducer.config()
        own = dict(reducer=self.reducer.name, drop_loc=config.pop("at")) | config
        return {k: v for k, v in self.built_from.items() if k != "keep_rate"} | own

    @_model_args.setter
    def _model_args(self, arguments: dict[str, Any]) -> None:
        self.built_from = arguments

    def set_keep_rate(self, keep_rate: KeepRate) -> None:
        """Use keep_rate, one number or one for each of drop_loc, from the next forward on."""
        self.reducer.set_keep_rate(keep_rate)

    def num_kept(self, num_patches: int) -> list[int]:
        """How many of an image's tokens each reduction keeps."""
        return self.reducer.kept(num_patches)

    def tokens_per_block(self) -> list[int]:
        """Image tokens that enter the MLP of each block (a fused token counts as one)."""
        n, at = self.patch_embed.num_patches, self.drop_loc
        left = [n, *self.reducer.counts(n)]
        return [left[bisect.bisect(at, i)] for i in range(len(self.blocks))]

    def patch_ids(self, x: Tensor) -> Tensor:
        """Ids (B, N) of the patches behind embedded tokens (B, T, C)."""
        ids_N = torch.arange(x.shape[1] - self.num_prefix_tokens, device=x.device)
        return ids_N.expand(x.shape[0], -1)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, T, C) that enter the first block."""
        raise NotImplementedError

    def rotary(self, num_patches: int) -> Tensor | None:
        """Rotary positions (1, 1, N, 2 D) that the blocks are given, if they are."""
        return None

    @property
    def head_reads_prefix(self) -> bool:
        """Whether the classifier reads prefix tokens alone: no other need leave the last block."""
        raise NotImplementedError

    def encode(
        self,
        x: Tensor,
        start: int = 0,
        stop: int | None = None,
        prefix_only: bool = False,
        states: list[Any] | None = None,
    ) -> tuple[Tensor, list[Reduction]]:
        """Embedded tokens, not reduced yet, through the blocks start to stop - 1.

        With prefix_only the last block returns the prefix tokens alone, if it reduces nothing. To
        states are added, for each block, its reduction if there is one, and the tokens after it.

        Returns: tokens (B, T', C), and the reductions on the way; not of places where all is kept.
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
        """block(x) with what is given but None; with gradient checkpointing where that is on."""
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
        return (x, follow.survivors(found, self.reducer, ids)) if return_kept else x

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
        """timm's, at any keep rate: each patch has the token that it went into.

        A patch that was dropped has the state in which it entered the block that dropped it.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal are not served: tokens move")
        assert output_fmt in ("NCHW", "NLC"), output_fmt
        take, last = feature_take_indices(len(self.blocks), indices)
        size, x = x.shape[-2:], self.embed(x)
        states: list[Any] = [x]
        self.encode(x, stop=last + 1 if stop_early else None, states=states)
        placed = list(follow.put_back(states, self.num_prefix_tokens))
        chosen = [self.norm(placed[i]) if norm else placed[i] for i in take]
        P = self.num_prefix_tokens
        maps: list[Any] = [tokens[:, P:] for tokens in chosen]
        if output_fmt == "NCHW":
            maps = [self.as_grid(tokens, size) for tokens in maps]
        prefix = [tokens[:, :P] for tokens in chosen] if P and return_prefix_tokens else None
        if output_dict:
            result = dict(image_intermediates=maps, image_intermediates_prefix=prefix)
            if not intermediates_only:
                result["image_features"] = self.norm(placed[-1])
            return {name: value for name, value in result.items() if value is not None}
        found = maps if prefix is None else list(zip(maps, prefix, strict=True))
        return found if intermediates_only else (self.norm(placed[-1]), found)

    def as_grid(self, tokens: Tensor, size: Any) -> Tensor:
        """Patches (B, N, C) of images of a size as a map (B, C, H, W)."""
        H, W = self.patch_embed.dynamic_feat_size(tuple(size))
        return tokens.reshape(tokens.shape[0], H, W, -1).permute(0, 3, 1, 2).contiguous()

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        return_kept: bool = False,
        return_source: bool = False,
        return_map: bool = False,
    ) -> Any:
        """Logits (B, num_classes) of images (B, 3, H, W).

        With return_kept also one int64 tensor (B, k) per reduction: the ids of the surviving
        patches in the original grid, row by row from the top left; -1 is a surviving fused token.
        With return_source also int64 (B, N): the token, class token included, that each patch is in
        at the end, -1 where it was dropped. With return_map also (B, C, H, W): the final normalised
        token that each patch is in; where it was dropped, its state when it was.
        """
        size, x = x.shape[-2:], self.embed(x)
        more = return_kept or return_source or return_map
        if self.reducer.masked and self.training and not more:
            return self.forward_head(self.norm(self.reducer.masked_features(self, x)[0]))
        states: list[Any] | None = [x] if return_map else None
        logits, found = self.classify(x, states=states)
        results: list[Any] = [logits]
        if return_kept:
            results.append(follow.survivors(found, self.reducer, self.patch_ids(x)))
        if return_source:
            results.append(follow.source(found, self.patch_ids(x), self.num_prefix_tokens))
        if states is not None:
            *_, last = follow.put_back(states, self.num_prefix_tokens)
            results.append(self.as_grid(self.norm(last)[:, self.num_prefix_tokens :], size))
        return tuple(results) if more else logits

    def classify(
        self, x: Tensor, start: int = 0, states: list[Any] | None = None
    ) -> tuple[Tensor, list[Reduction]]:
        """Logits of embedded tokens that have been through the blocks before `start`."""
        prefix_only = self.head_reads_prefix and states is None
        x, found = self.encode(x, start, prefix_only=prefix_only, states=states)
        return self.logits(self.norm(x), found), found

    def logits(self, x: Tensor, found: list[Reduction]) -> Tensor:
        """Logits of normalised tokens; their mean counts each for the patches in it."""
        sizes_BT = found[-1].sizes_BT if found else None
        if self.global_pool == "avg" and sizes_BT is not None and sizes_BT.shape[1] == x.shape[1]:
            x = follow.weigh(x, sizes_BT, self.num_prefix_tokens)
        return self.forward_head(x)

    def token_outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits, and what a teacher is compared by at each image token (B, N, ...)."""
        return self.forward_head(x), x[:, self.num_prefix_tokens :]

    def token_distance(self, own: Tensor, teacher: Tensor) -> Tensor:
        """Distance of the second values of token_outputs, (B, N)."""
        return (own.float() - teacher.float()).square().mean(-1)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a class that was made for one of timm's by that one."""
        how: Any = super().__reduce_ex__(protocol)
        return how if self.kind is None else (self.blank, (self.kind,), *how[2:])
