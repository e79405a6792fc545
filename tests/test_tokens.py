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
    prefix_BPC, index_BK = torch.randn(B, P, C), tokens.choose(score_BN, 4)
    out = tokens.reorganize(torch.cat([prefix_BPC, x_BNC], 1), score_BN, index_BK, fusion)
    assert out.shape == (B, P + 4 + fusion, C)
    assert torch.equal(out[:, :P], prefix_BPC)
    assert torch.equal(out[:, P : P + 4], tokens.gather(x_BNC, index_BK))
    if fusion:
        torch.testing.assert_close(out[:, -1:], tokens.fuse(x_BNC, score_BN, index_BK))


@pytest.mark.parametrize("fusion", [True, False])
def test_ids_follow_their_tokens_and_a_fused_one_has_none(score_BN, fusion):
    index_BK = tokens.choose(score_BN, 4)
    ids = tokens.follow(torch.arange(N).expand(B, -1), index_BK, fusion)
    assert torch.equal(ids[:, :4], index_BK)
    assert ids.shape == (B, 4 + fusion) and (ids[:, 4:] == -1).all()


@pytest.mark.parametrize(("selection", "largest"), [("attentive", True), ("inattentive", False)])
def test_selection_of_the_attentive_or_the_inattentive(score_BN, selection, largest):
    chosen = tokens.choose(score_BN, 4, selection).sort(1).values
    assert torch.equal(chosen, score_BN.topk(4, largest=largest).indices.sort(1).values)


def test_random_selection_draws_without_repetition_whatever_the_scores(score_BN):
    torch.manual_seed(0)
    chosen = tokens.choose(score_BN, 4, "random")
    torch.manual_seed(0)
    assert torch.equal(chosen, tokens.choose(torch.zeros(B, N), 4, "random"))
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    assert not torch.equal(chosen.sort(1).values, tokens.choose(score_BN, 4).sort(1).values)
