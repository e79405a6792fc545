"""Token reorganization, on small random tensors."""

import math

import pytest
import torch

from evit import tokens

B, H, D, P, N, C = 3, 4, 8, 2, 11, 16


@pytest.fixture
def qk():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, B, H, P + N, D, generator=generator)


@pytest.fixture
def x_BNC():
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def score_BN():
    return torch.rand(B, N, generator=torch.Generator().manual_seed(2))


def test_class_attention_is_the_class_row_of_the_full_attention(qk):
    q, k = qk
    full_BHTT = (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1)
    torch.testing.assert_close(tokens.class_attention(q, k, P), full_BHTT[:, :, 0, P:].mean(1))


def test_class_attention_is_not_renormalised(qk):
    q, k = qk
    assert (tokens.class_attention(q, k, P).sum(1) < 0.999).all()


def test_class_attention_of_bfloat16_is_scored_in_float32(qk):
    q, k = qk.bfloat16()
    assert tokens.class_attention(q, k, P).dtype == torch.float32


@pytest.mark.parametrize(
    ("n", "rate", "k"), [(196, 0.7, 138), (196, 0.5, 98), (99, 0.5, 50), (5, 0.01, 1), (7, 1.0, 7)]
)
def test_num_kept_rounds_up(n, rate, k):
    assert tokens.num_kept(n, rate) == k


def test_choose_takes_the_highest_scores_of_each_image(score_BN):
    chosen = tokens.choose(score_BN, 4).sort(1).values
    expected = score_BN.argsort(1, descending=True)[:, :4].sort(1).values
    assert torch.equal(chosen, expected)


def test_fused_token_is_the_score_weighted_sum_of_the_others(x_BNC, score_BN):
    index_BK = tokens.choose(score_BN, 4)
    fused = tokens.fuse(x_BNC, score_BN, index_BK)
    for b in range(B):
        others = sorted(set(range(N)) - set(index_BK[b].tolist()))
        expected = sum(score_BN[b, i] * x_BNC[b, i] for i in others)
        torch.testing.assert_close(fused[b, 0], expected)


def test_gradient_reaches_the_scores_and_the_tokens_through_the_fused_token(x_BNC, score_BN):
    x_BNC.requires_grad_()
    score_BN.requires_grad_()
    index_BK = tokens.choose(score_BN, 4)
    tokens.fuse(x_BNC, score_BN, index_BK).sum().backward()
    discarded = torch.ones(B, N).scatter(1, index_BK, 0.0).bool()
    assert ((score_BN.grad != 0) == discarded).all()
    assert ((x_BNC.grad != 0).any(-1) == discarded).all()


@pytest.mark.parametrize("fusion", [True, False])
def test_reorganize_keeps_the_prefix_then_the_chosen_then_the_fused(x_BNC, score_BN, fusion):
    prefix_BPC = torch.randn(B, P, C)
    x_BTC = torch.cat([prefix_BPC, x_BNC], 1)
    ids_BN = torch.arange(N).expand(B, -1)
    out, ids = tokens.reorganize(x_BTC, score_BN, 4, fusion, ids_BN)
    assert out.shape == (B, P + 4 + fusion, C)
    assert torch.equal(out[:, :P], prefix_BPC)
    assert torch.equal(out[:, P : P + 4], tokens.gather(x_BNC, ids[:, :4]))
    assert ids.shape == (B, 4 + fusion)
    if fusion:
        assert (ids[:, -1] == -1).all()
        torch.testing.assert_close(out[:, -1:], tokens.fuse(x_BNC, score_BN, ids[:, :4]))


@pytest.mark.parametrize("fusion", [True, False])
def test_reorganize_changes_nothing_when_every_token_is_kept(x_BNC, score_BN, fusion):
    x_BTC = torch.cat([torch.randn(B, P, C), x_BNC], 1)
    assert tokens.reorganize(x_BTC, score_BN, N, fusion)[0] is x_BTC
