"""timm's Block with a token reduction in it, still a module made of modules.

Every block, linear layer, norm and activation is called. Two shortcuts (slicing a linear layer's
weight, overwriting an activation's input) are taken only if nothing hooks or wraps it (`plain`).
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

from evit.reducers.tokens import Module, Reduction, Seen, plain

ATTENTIONS = Attention, EvaAttention, AttentionRope  # the kinds that are served


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


def project(attn: Any, x_BTC: Tensor, first: int, last: int, rope: Any = None) -> list[Tensor]:
    """Compute query (0), key (1), value (2) from first to last - 1, (B, H, T, D) each."""
    if not isinstance(attn, Attention):
        return rotated(attn, x_BTC, rope)[first:last]
    norms = (attn.q_norm, attn.k_norm, None)[first:last]
    if len(norms) < 3 and plain(attn.qkv, nn.Linear):
        rows, bias = slice(first * attn.attn_dim, last * attn.attn_dim), attn.qkv.bias
        flat = F.linear(x_BTC, attn.qkv.weight[rows], None if bias is None else bias[rows])
        first, last = 0, len(norms)
    else:
        flat = attn.qkv(x_BTC)
    split = flat.unflatten(2, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return [n(part) if n else part for n, part in zip(norms, split[first:last], strict=True)]


def mix(attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend as timm's Attention.forward, without the output projection; returns (B, T, C)."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    out_BHTD = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=attn.scale)
    return attn.norm(out_BHTD.transpose(1, 2).flatten(2))


def masked_attention(attn: Any, x_BTC: Tensor, kept_BT: Tensor, rope_B1ND: Any) -> Tensor:
    """Let each token see itself and the kept tokens (kept_BT: 1, with gradients): DynamicViT's
    training. The softmax follows the authors' code, in float32 at any precision."""
    T = x_BTC.shape[1]
    q, k, v = project(attn, x_BTC, 0, 3, rope_B1ND)
    logits = ((q * attn.scale) @ k.mT).float()
    seen_BTT = kept_BT[:, None].float().expand(-1, T, -1)
    seen_BTT = seen_BTT + (1 - seen_BTT) * torch.eye(T, device=logits.device)
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * seen_BTT[:, None]
    weight = (weight + 1e-6 / T) / (weight.sum(-1, keepdim=True) + 1e-6)
    return attn.norm((attn.attn_drop(weight.to(v.dtype)) @ v).transpose(1, 2).flatten(2))


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
    """Request for one block: with num_kept it reduces, and fills in `reduction`; with mask_BT it
    hides tokens from the attention; with neither it returns the prefix tokens only."""

    num_prefix: int
    reducer: Any = None
    place: int = 0  # index into reducer.at
    num_kept: int | None = None
    sizes_BT: Tensor | None = None
    class_token: bool = True
    mask_BT: Tensor | None = None
    reduction: Reduction | None = None


class Reducing(Module):
    """The forward pass of a reducing block, which calls the parts of `attn` (qkv, norms, proj).

    `whole` is timm's. Subclasses: `add` adds the attention's output to x; `after` is the rest."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, step: Any = None, rope: Any = None
    ) -> Tensor:
        """Map tokens (B, T, C) to (B, T, C), or with a step to the remaining tokens."""
        if step is None:
            return self.whole(x, attn_mask, rope)
        attn, P, reducer = self.attn, step.num_prefix, step.reducer
        if step.mask_BT is not None:
            out = masked_attention(attn, self.norm1(x), step.mask_BT, rope)
            return self.after(self.add(x, self.projected(out)))
        if step.num_kept is None:
            if not plain(self, type(self)) or not plain(attn, *ATTENTIONS):
                return self.whole(x, attn_mask, rope)  # hooks expect all tokens
            q, k, v = self.queries(self.norm1(x), P, rope)
            return self.after(self.add(x[:, :P], self.projected(mix(attn, q, k, v, attn_mask))))
        seen = Seen(x, P, scale=attn.scale, sizes_BT=step.sizes_BT, class_token=step.class_token)
        seen.bias_B11T, seen.rope_B1ND = attn_mask, rope
        if reducer.stage == "block":
            x, step.reduction = reducer.through(self, step.place, seen, step.num_kept)
            return x
        if reducer.stage == "input":
            reduction = step.reduction = reducer.plan(step.place, seen, step.num_kept)
            bias = reducer.key_bias(reduction.sizes_BT, x.dtype)
            return self.whole(reduction(x), bias, reduction.positions(rope))
        y = self.norm1(x)
        one = reducer.selects and step.class_token and self.slices
        q, k, v = self.queries(y, 1 if one else y.shape[1], rope)
        seen.q_BHTD, seen.k_BHTD, seen.v_BHTD = q, k, v
        if reducer.stage == "residual":
            seen.x_BTC = x = self.add(x, self.projected(mix(attn, q, k, v, attn_mask)))
        reduction = step.reduction = reducer.plan(step.place, seen, step.num_kept)
        if reducer.stage == "residual":
            return self.after(reduction(x))
        if one:  # only the remaining tokens need a query
            (q,) = project(attn, reduction(y), 0, 1)
        elif reducer.selects:
            q = reduction(q.transpose(1, 2).flatten(2)).unflatten(2, q.shape[1::2]).transpose(1, 2)
        out = mix(attn, q, k, v, attn_mask)  # the projection is linear, so it can follow
        out = attn.proj(out) if reducer.selects else reduction.project(attn.proj, out)
        return self.after(self.add(reduction(x), attn.proj_drop(out)))

    @property
    def slices(self) -> bool:
        """Whether query, key and value may be computed separately."""
        return isinstance(self.attn, Attention) and plain(self.attn.qkv, nn.Linear)

    def queries(self, y: Tensor, count: int, rope: Any) -> Any:
        """The query of the first `count` tokens, the key and value of all."""
        if count < y.shape[1] and self.slices:
            return *project(self.attn, y[:, :count], 0, 1), *project(self.attn, y, 1, 3)
        q, k, v = project(self.attn, y, 0, 3, rope)
        return q if count == y.shape[1] else q[:, :, :count], k, v

    def whole(self, x: Tensor, bias: Tensor | None, rope: Tensor | None) -> Tensor:
        more = {} if rope is None else dict(rope=rope)
        return self.after(self.add(x, self.attn(self.norm1(x), attn_mask=bias, **more)))

    def projected(self, out: Tensor) -> Tensor:
        return self.attn.proj_drop(self.attn.proj(out))


class ReducedBlock(Reducing, Block):
    """timm's Block; reduces tokens if forward gets a step."""

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(self.ls1(out))

    def after(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(feed_forward(self.mlp, self.norm2(x))))


class ReducedEvaBlock(Reducing, EvaBlock):  # type: ignore[misc]
    """timm's EvaBlock with rotary positions; reduces tokens if forward gets a step."""

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        return x + self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def after(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)
