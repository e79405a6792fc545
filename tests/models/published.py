"""EViT as it was published, in the plainest PyTorch: what every shortcut has to agree with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import evit


def published_forward(model: evit.EViT, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the ids of the patches kept by each reorganization, in order of their scores.

    The weights are those of the model's modules; the way through them is the paper's: whole
    attention matrices, all tokens to the end. LV-ViT differs in its halved residuals and second
    head.
    """
    x = model.patch_embed(images)
    ids = torch.arange(x.shape[1]).expand(len(x), -1)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    rates = dict(zip(model.drop_loc, model.keep_rate, strict=True))
    kept = []
    for i, block in enumerate(model.blocks):
        attended, attention = attend(block.attn, block.norm1(x))
        x = x + block.ls1(attended)
        if i in rates:
            x, ids, count = reorganize(x, ids, attention, rates[i], model.fusion)
            kept.append(ids[:, :count])
        x = x + block.ls2(block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)))))
    x = model.norm(x)
    logits = model.head(x[:, 0])
    if isinstance(model, evit.LVViT):
        logits = logits + 0.5 * model.aux_head(x[:, 1:]).max(1).values
    return logits, kept


def attend(attn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Multi-head attention: what comes out (B, T, C), and its matrix (B, H, T, T)."""
    B, T, C = x.shape
    q, k, v = attn.qkv(x).reshape(B, T, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
    return attn.proj((attention @ v).transpose(1, 2).reshape(B, T, C)), attention


def reorganize(
    x: Tensor, ids: Tensor, attention: Tensor, keep_rate: float, fusion: bool
) -> tuple[Tensor, Tensor, int]:
    """The tokens that stay, class token first and fused token last; their ids; how many were kept.

    Scores are the class token's attention to the others, averaged over the heads; the weights of
    the fused token are the scores of the discarded ones, as they are.
    """
    n = x.shape[1] - 1
    count = math.ceil(keep_rate * n)
    if count == n:
        return x, ids, count
    scores = attention.mean(1)[:, 0, 1:]
    order = scores.sort(descending=True).indices
    kept, complement = order[:, :count], order[:, count:].sort().values
    images = torch.arange(len(x))[:, None]
    cls, tokens = x[:, :1], x[:, 1:]
    parts, ids_left = [cls, tokens[images, kept]], ids[images, kept]
    if fusion:
        weighted = tokens[images, complement] * scores[images, complement][:, :, None]
        parts.append(weighted.sum(1, keepdim=True))
        ids_left = torch.cat([ids_left, torch.full((len(x), 1), -1)], 1)
    return torch.cat(parts, 1), ids_left, count
