"""Methods without published outputs for these settings, against their formulas written plainly."""

import math

import pytest
import torch
import torch.nn.functional as F

from evit.reducers import Seen
from tests.reducers.tiny import AT, COUNTS, images, reduced, vit


def merge(x, size, score, cosine, k):
    """Top-K by class attention; each other goes to its nearest; plain means, weighted sizes."""
    kept, away, best, host = top(score, cosine, k)
    member = F.one_hot(host, k).T.to(x)
    mean = (x[kept] + member @ x[away]) / (1 + member.sum(1))[:, None]
    return mean, (size[kept] + member @ (size[away] * best)).clamp(1), kept, away, host


def squeeze(x, size, score, cosine, k):
    """Top-K by class attention; each other goes to its nearest with weight exp(cosine)."""
    kept, away, best, host = top(score, cosine, k)
    weight = F.one_hot(host, k).T.to(x) * best.exp()
    mean = (math.e * x[kept] + weight @ x[away]) / (math.e + weight.sum(1))[:, None]
    return mean, torch.ones_like(size[kept]), kept, away, host


def cover(x, size, score, cosine, k):
    """The k farthest from whatever has more class attention; means by class attention."""
    higher = score[None] > score[:, None]
    distance = 1 - cosine.masked_fill(~higher, -1).amax(1)
    kept = (distance * (score / score.mean()) ** 0.25 * size**0.5).topk(k).indices
    away = others(kept, len(x))
    host = cosine[away][:, kept].argmax(1)
    member = torch.eye(k).to(x), F.one_hot(host, k).T.to(x)
    every = torch.cat([kept, away])
    weight = torch.cat(member, 1) * score[every]
    mean = weight @ x[every] / weight.sum(1, keepdim=True)
    return mean, torch.cat(member, 1) @ size[every], kept, away, host


def top(score, cosine, k):
    kept = score.topk(k).indices
    away = others(kept, len(score))
    return kept, away, *cosine[away][:, kept].max(1)


def others(kept, n):
    return torch.tensor([i for i in range(n) if i not in kept])


def plainly(model, image, method):
    """Logits (7,) and source (64,) of one image, by whole attention matrices."""
    x = model._pos_embed(model.patch_embed(image[None]))[0]
    size, source = torch.ones_like(x[:, 0]), torch.arange(1, len(x))
    counts = dict(zip(AT, COUNTS, strict=True))
    for i, block in enumerate(model.blocks):
        attn = block.attn
        q, k, v = attn.qkv(block.norm1(x)).reshape(len(x), 3, 3, 16).permute(1, 2, 0, 3)
        attention = (q @ k.transpose(1, 2) / 4 + size.log()).softmax(-1)
        x = x + attn.proj((attention @ v).transpose(0, 1).flatten(1))
        if i in counts:
            unit = F.normalize(x[1:], dim=1)
            score = attention[:, 0, 1:].mean(0)
            mean, sizes, kept, away, host = method(x[1:], size[1:], score, unit @ unit.T, counts[i])
            place = torch.empty(len(x) - 1, dtype=torch.int64)
            place[kept], place[away] = torch.arange(counts[i]), host
            x, size = torch.cat([x[:1], mean]), torch.cat([size[:1], sizes])
            source = 1 + place[source - 1]
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[0]), source


@pytest.mark.parametrize("method", [merge, squeeze, cover])
@torch.no_grad()
def test_it_is_the_formula(method):
    x, dense = images(3).double(), vit().double()
    logits, source = zip(*(plainly(dense, image, method) for image in x), strict=True)
    model = reduced(method.__name__, dense)
    ours, ours_source = model(x, return_source=True)
    torch.testing.assert_close(ours, torch.stack(logits), atol=1e-6, rtol=0)
    for a, b in zip(ours_source, source, strict=True):
        assert torch.equal(a[:, None] == a, b[:, None] == b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_cover_chooses_in_half_precision_as_in_float32(dtype):
    reducer = reduced("cover").reducer
    x, q, k = torch.randn(4, 65, 48), torch.randn(4, 3, 65, 16), torch.randn(4, 3, 65, 16)
    half = [part.to(dtype) for part in (x, q, k)]
    for autocast in (False, True):
        with torch.autocast("cpu", dtype, enabled=autocast):
            plans = [
                reducer.plan(0, Seen(tokens, 1, queries, keys, scale=0.25), 40)
                for tokens, queries, keys in (half, [part.float() for part in half])
            ]
        assert torch.equal(plans[0].index_BK, plans[1].index_BK)
        assert torch.equal(plans[0].host_BN, plans[1].host_BN)


@pytest.mark.parametrize("name", ["merge", "squeeze", "cover", "tome", "pitome"])
def test_tokens_are_alike_by_direction_whatever_their_length(name):
    reducer, draw = reduced(name).reducer, torch.Generator().manual_seed(0)
    x, q, k = torch.randn(4, 65, 48, generator=draw), *torch.randn(2, 4, 3, 65, 16, generator=draw)
    of_keys = name in ("tome", "pitome")
    plans = [
        reducer.plan(0, Seen(x * length, 1, q, k * length if of_keys else k, scale=0.25), 40)
        for length in (1, 1e-3)
    ]
    assert torch.equal(plans[0].host_BN, plans[1].host_BN)
    torch.testing.assert_close(plans[0].weight_BKN, plans[1].weight_BKN)
