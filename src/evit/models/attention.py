"""The steps of timm's Attention and Block, so that they can be taken in another order."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn


def project(attn: Any, x_BTC: Tensor, first: int, last: int) -> list[Tensor]:
    """Some of query (0), key (1) and value (2) of timm's Attention, (B, H, T, D) each."""
    B, T, _ = x_BTC.shape
    weight, bias, dim = attn.qkv.weight, attn.qkv.bias, len(attn.qkv.weight) // 3
    rows = slice(first * dim, last * dim)
    flat = F.linear(x_BTC, weight[rows], None if bias is None else bias[rows])
    parts = flat.reshape(B, T, last - first, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    norms = (attn.q_norm, attn.k_norm, None)[first:last]
    return [norm(part) if norm else part for norm, part in zip(norms, parts, strict=True)]


def mix(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """timm's Attention.forward from query, key and value up to its output projection, (B, T, C)."""
    dropout = attn.attn_drop.p if attn.training else 0.0
    out_BHTD = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=attn.scale)
    return attn.norm(out_BHTD.transpose(1, 2).flatten(2))


def residual(block: Any, x_BTC: Tensor, out_BTC: Tensor) -> Tensor:
    """timm's Block.forward from the attention's projected output on."""
    x_BTC = x_BTC + block.drop_path1(block.ls1(block.attn.proj_drop(out_BTC)))
    return x_BTC + block.drop_path2(block.ls2(block.mlp(block.norm2(x_BTC))))


def prefix_block(block: Any, x_BTC: Tensor, num_prefix: int) -> Tensor:
    """timm's Block.forward, of the prefix tokens alone, (B, P, C)."""
    y_BTC, x_BPC = block.norm1(x_BTC), x_BTC[:, :num_prefix]
    (q,) = project(block.attn, y_BTC[:, :num_prefix], 0, 1)
    k, v = project(block.attn, y_BTC, 1, 3)
    return residual(block, x_BPC, block.attn.proj(mix(block.attn, q, k, v)))


class InplaceGELU(nn.GELU):
    """nn.GELU that overwrites its input while no gradients are recorded.

    So an MLP needs one wide buffer, not two: fresh memory costs a CPU more than the GELU itself. A
    forward hook that keeps what fc1 returns then finds it after the GELU.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        return torch.ops.aten.gelu_(input, approximate=self.approximate)


def use_inplace_gelu(block: Any) -> None:
    """Let the nn.GELU of a block's Mlp, whose input nothing else reads, be an InplaceGELU."""
    if type(block.mlp) is Mlp and type(block.mlp.act) is nn.GELU:
        block.mlp.act.__class__ = InplaceGELU
