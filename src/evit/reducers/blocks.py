"""timm's Block with a token reduction in it, still a module made of modules.

Every block is called, and so is every linear layer, norm and activation in it. Two shortcuts,
slicing the weight of a linear layer and overwriting the input of an activation, are taken only if
nothing hooks, wraps or parametrizes that module (`plain`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, Mlp, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from evit.reducers.base import Reducer
from evit.reducers.tokens import Reduction, Seen, plain

ROTATED = EvaAttention, AttentionRope
ATTENTIONS = Attention, *ROTATED  # the kinds that are served


def parts(attn: Any, flat_BTX: Tensor, first: int, last: int) -> list[Tensor]:
    """Split rows of attn.qkv's output into query (0), key (1), value (2), (B, H, T, D) each."""
    B, T, _ = flat_BTX.shape
    shape = (B, T, last - first, attn.num_heads, attn.head_dim)
    split = flat_BTX.reshape(shape).permute(2, 0, 3, 1, 4)
    norms = (attn.q_norm, attn.k_norm, None)[first:last]
    return [norm(part) if norm else part for norm, part in zip(norms, split.unbind(0), strict=True)]


def rotated(attn: Any, x_BTC: Tensor, rope_B1ND: Tensor | None) -> list[Tensor]:
    """Query, key and value of timm's Eva attention, with rotary positions applied."""
    if attn.qkv is None:
        flat = torch.cat([attn.q_proj(x_BTC), attn.k_proj(x_BTC), attn.v_proj(x_BTC)], -1)
    else:
        flat = attn.qkv(x_BTC)
        if getattr(attn, "q_bias", None) is not None:
            flat = flat + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, v = flat.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    rotate, P = partial(apply_rot_embed_cat, half=attn.rotate_half), attn.num_prefix_tokens
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope_B1ND is not None:
        q = torch.cat([q[:, :, :P], rotate(q[:, :, P:], rope_B1ND)], 2).type_as(v)
        k = torch.cat([k[:, :, :P], rotate(k[:, :, P:], rope_B1ND)], 2).type_as(v)
    return [q, k, v]


def project(
    attn: Any, x_BTC: Tensor, first: int, last: int, rope_B1ND: Tensor | None = None
) -> list[Tensor]:
    """Compute query (0), key (1), value (2) from first to last - 1, (B, H, T, D) each."""
    if isinstance(attn, ROTATED):
        return rotated(attn, x_BTC, rope_B1ND)[first:last]
    if last - first == 3 or not plain(attn.qkv, nn.Linear):
        return parts(attn, attn.qkv(x_BTC), 0, 3)[first:last]
    weight, bias, dim = attn.qkv.weight, attn.qkv.bias, attn.attn_dim
    rows = slice(first * dim, last * dim)
    flat = F.linear(x_BTC, weight[rows], None if bias is None else bias[rows])
    return parts(attn, flat, first, last)


def mix(attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend as timm's Attention.forward, without the output projection; returns (B, T, C)."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    out_BHTD = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=attn.scale)
    return attn.norm(out_BHTD.transpose(1, 2).flatten(2))


def masked_attention(attn: Any, x_BTC: Tensor, step: Any, rope_B1ND: Any) -> Tensor:
    """Let each token see the kept tokens (step.mask_BT, ones and zeros, has gradients) and itself.

    For training DynamicViT; the softmax follows the authors' code, in float32 at any precision.
    """
    T, kept_BT = x_BTC.shape[1], step.mask_BT
    q, k, v = project(attn, x_BTC, 0, 3, rope_B1ND)
    logits = ((q * attn.scale) @ k.transpose(-2, -1)).float()
    seen_BTT = kept_BT[:, None].float().expand(-1, T, -1)
    seen_BTT = seen_BTT + (1 - seen_BTT) * torch.eye(T, device=logits.device)
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * seen_BTT[:, None]
    weight = (weight + 1e-6 / T) / (weight.sum(-1, keepdim=True) + 1e-6)
    out = attn.attn_drop(weight.to(v.dtype)) @ v
    return attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))


def feed_forward(mlp: Any, x_BTC: Tensor) -> Tensor:
    """mlp(x); in eager inference on a CPU the GELU overwrites its input: memory costs more."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    eager = x_BTC.is_cpu and not torch.is_grad_enabled() and not traced
    inside = eager and plain(mlp, Mlp) and plain(mlp.act, nn.GELU)
    if not inside or not plain(mlp.fc1, nn.Linear) or not plain(mlp.drop1, nn.Dropout):
        return mlp(x_BTC)
    wide = torch.ops.aten.gelu_(mlp.fc1(x_BTC), approximate=mlp.act.approximate)
    return mlp.drop2(mlp.fc2(mlp.norm(mlp.drop1(wide))))


@dataclass
class Step:
    """Request for one block to reduce its tokens; the block fills in `reduction`.

    If num_kept is None nothing is reduced: mask_BT hides tokens from the attention, and without a
    mask the block returns the prefix tokens only.
    """

    num_prefix: int
    reducer: Reducer | None = None
    place: int = 0  # index into reducer.at
    num_kept: int | None = None
    sizes_BT: Tensor | None = None
    bias_B11T: Tensor | None = None
    class_token: bool = True
    mask_BT: Tensor | None = None
    reduction: Reduction | None = None

    def seen(self, x_BTC: Tensor, **others: Any) -> Seen:
        known: Any = dict(sizes_BT=self.sizes_BT, bias_B11T=self.bias_B11T)
        return Seen(x_BTC, self.num_prefix, class_token=self.class_token, **known, **others)

    def reduce(self, seen: Seen) -> Reduction:
        assert self.reducer is not None and self.num_kept is not None
        self.reduction = self.reducer.plan(self.place, seen, self.num_kept)
        return self.reduction


class Reducing(nn.Module):
    """The forward pass of a reducing block, shared by timm's Block and EvaBlock.

    If it reduces, it calls the parts of `attn` (qkv, norms, proj) instead of `attn` itself.
    """

    attn: Any
    mlp: Any
    norm1: Any
    whole: Any  # timm's forward pass of the whole block
    add: Any  # adds the attention's output to the residual stream
    after: Any  # the rest of timm's forward pass: norm, MLP and residual

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, step: Any = None, rope: Any = None
    ) -> Tensor:
        """Map tokens (B, T, C) to (B, T, C), or with a step to the remaining tokens."""
        if step is None:
            return self.whole(x, attn_mask, rope)
        if step.mask_BT is not None:
            return self.after(self.add(x, masked_attention(self.attn, self.norm1(x), step, rope)))
        if step.num_kept is None:
            return self.prefix_alone(x, step, attn_mask, rope)
        stage, attn = step.reducer.stage, self.attn
        if stage == "input":
            reduction = step.reduce(step.seen(x))
            bias = step.reducer.key_bias(reduction.sizes_BT, x.dtype)
            return self.whole(reduction(x), bias, reduction.positions(rope))
        if stage == "block":
            seen = step.seen(x, rope_B1ND=rope)
            x, step.reduction = step.reducer.through(self, step.place, seen, step.num_kept)
            return x
        y = self.norm1(x)
        one = step.reducer.selects and step.class_token and self.slices
        q, k, v = self.queries(y, 1 if one else y.shape[1], rope)
        seen = step.seen(x, q_BHTD=q, k_BHTD=k, v_BHTD=v, scale=attn.scale)
        if stage == "residual":
            seen.x_BTC = x = self.add(x, self.projected(mix(attn, q, k, v, seen.bias_B11T)))
            return self.after(step.reduce(seen)(x))
        reduction = step.reduce(seen)
        if step.reducer.selects:  # only the remaining tokens need a query
            if q.shape[2] == 1:
                (q,) = project(attn, reduction(y), 0, 1)
            else:
                q = reduction(q.transpose(1, 2).flatten(2)).unflatten(2, q.shape[1::2])
                q = q.transpose(1, 2)
            out = attn.proj(mix(attn, q, k, v, seen.bias_B11T))
        else:  # the projection is linear, so it can follow the reduction
            out = reduction.project(attn.proj, mix(attn, q, k, v, seen.bias_B11T))
        return self.after(self.add(reduction(x), attn.proj_drop(out)))

    @property
    def slices(self) -> bool:
        """Whether query, key and value may be computed separately."""
        return isinstance(self.attn, Attention) and plain(self.attn.qkv, nn.Linear)

    def queries(self, y: Tensor, count: int, rope: Any) -> tuple[Tensor, ...]:
        """The query of the first `count` tokens, the key and value of all."""
        if count < y.shape[1] and self.slices:
            return *project(self.attn, y[:, :count], 0, 1), *project(self.attn, y, 1, 3)
        q, k, v = project(self.attn, y, 0, 3, rope)
        return q if count == y.shape[1] else q[:, :, :count], k, v

    def projected(self, out: Tensor) -> Tensor:
        """Apply the attention's output projection and dropout."""
        return self.attn.proj_drop(self.attn.proj(out))

    def prefix_alone(self, x: Tensor, step: Step, bias: Tensor | None, rope: Any) -> Tensor:
        """Compute the block's output for the prefix tokens only, (B, P, C)."""
        attn, P = self.attn, step.num_prefix
        if not plain(self, type(self)) or not plain(attn, *ATTENTIONS):  # hooks expect all tokens
            return self.whole(x, bias, rope)
        q, k, v = self.queries(self.norm1(x), P, rope)
        return self.after(self.add(x[:, :P], self.projected(mix(attn, q, k, v, bias))))


class ReducedBlock(Reducing, Block):
    """timm's Block; reduces tokens if forward gets a step."""

    def whole(self, x: Tensor, bias: Tensor | None, rope: Any) -> Tensor:
        return self.after(self.add(x, self.attn(self.norm1(x), attn_mask=bias)))

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(self.ls1(out))

    def after(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(feed_forward(self.mlp, self.norm2(x))))


class ReducedEvaBlock(Reducing, EvaBlock):  # type: ignore[misc]
    """timm's EvaBlock with rotary positions; reduces tokens if forward gets a step."""

    def whole(self, x: Tensor, bias: Tensor | None, rope: Any) -> Tensor:
        return EvaBlock.forward(self, x, rope, bias)

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def after(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)
