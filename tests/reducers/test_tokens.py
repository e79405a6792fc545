"""EViT's reduction and its parts, on small random tensors."""

import math

import pytest
import torch

from evit.reducers import EViT, Reduction, Seen

B, H, D, P, N, C = 3, 4, 8, 2, 11, 16


@pytest.fixture
def qk():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, B, H, P + N, D, generator=generator)


@pytest.fixture
def x_BTC():
    return torch.randn(B, P + N, C, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def score_BN():
    return torch.rand(B, N, generator=torch.Generator().manual_seed(2))


def plan(score_BN, **options) -> Reduction:
    """EViT's decision for given scores."""
    seen = Seen(torch.zeros(B, P + N, C), P)
    seen.scores = lambda: score_BN
    return EViT(keep_rate=0.5, **options).plan(0, seen, 4)


def test_scores_are_the_class_row_of_the_full_attention(qk, x_BTC):
    q, k = qk
    full_BHTT = (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1)
    seen = Seen(x_BTC, P, q, k, scale=D**-0.5)
    torch.testing.assert_close(seen.scores(), full_BHTT[:, :, 0, P:].mean(1))
    assert (seen.scores().sum(1) < 0.999).all()  # not renormalised
    without = Seen(x_BTC, P, q, k, scale=D**-0.5, class_token=False)
    torch.testing.assert_close(without.scores(), full_BHTT[:, :, :, P:].mean((1, 2)))


def test_sizes_enter_the_scores_as_repeated_tokens_would(qk, x_BTC):
    q, k = qk
    sizes = torch.ones(B, 1, 1, P + N)
    sizes[..., -1] = 2
    twice = torch.cat([k, k[:, :, -1:]], 2)
    rows = Seen(x_BTC, P, q, k, bias_B11T=sizes.log()).rows()
    torch.testing.assert_close(rows[..., :-1], Seen(x_BTC, P, q, twice).rows()[..., :-2])


def test_scores_of_bfloat16_are_in_float32(qk, x_BTC):
    q, k = qk.bfloat16()
    assert Seen(x_BTC, P, q, k).scores().dtype == torch.float32


@pytest.mark.parametrize(
    ("n", "rate", "k"), [(196, 0.7, 138), (196, 0.5, 98), (99, 0.5, 50), (5, 0.01, 1), (7, 1.0, 7)]
)
def test_counts_round_up(n, rate, k):
    reducer = EViT(at=[0])
    reducer.set_keep_rate(rate)
    assert reducer.kept(n) == [k]


def test_the_fused_token_is_the_score_weighted_sum_of_the_others(x_BTC, score_BN):
    reduction = plan(score_BN)
    fused = reduction(x_BTC)[:, -1]
    for b in range(B):
        others = sorted(set(range(N)) - set(reduction.index_BK[b].tolist()))
        expected = sum(score_BN[b, i] * x_BTC[b, P + i] for i in others)
        torch.testing.assert_close(fused[b], expected)


def test_gradient_reaches_scores_and_tokens_through_the_fused_token(x_BTC, score_BN):
    x_BTC.requires_grad_()
    score_BN.requires_grad_()
    reduction = plan(score_BN)
    reduction(x_BTC)[:, -1].sum().backward()
    discarded = torch.ones(B, N).scatter(1, reduction.index_BK, 0.0).bool()
    assert ((score_BN.grad != 0) == discarded).all()
    assert ((x_BTC.grad[:, P:] != 0).any(-1) == discarded).all()


@pytest.mark.parametrize("fusion", [True, False])
def test_the_prefix_comes_first_then_the_kept_then_the_fused(x_BTC, score_BN, fusion):
    reduction = plan(score_BN, fusion=fusion)
    out = reduction(x_BTC)
    assert out.shape == (B, P + 4 + fusion, C)
    assert torch.equal(out[:, :P], x_BTC[:, :P])
    for b in range(B):
        assert torch.equal(out[b, P : P + 4], x_BTC[b, P + reduction.index_BK[b]])


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_projecting_after_the_reduction_is_projecting_before(x_BTC, score_BN, fusion, bias):
    linear, reduction = torch.nn.Linear(C, C, bias=bias), plan(score_BN, fusion=fusion)
    torch.testing.assert_close(reduction.project(linear, x_BTC), reduction(linear(x_BTC)))


@pytest.mark.parametrize("fusion", [True, False])
def test_ids_and_hosts_follow_tokens(score_BN, fusion):
    reduction = plan(score_BN, fusion=fusion)
    ids = reduction.ids(torch.arange(N).expand(B, -1))
    assert torch.equal(ids[:, :4], reduction.index_BK)
    assert ids.shape == (B, 4 + fusion) and (ids[:, 4:] == -1).all()
    hosts = reduction.hosts(N)
    assert torch.equal(hosts.gather(1, reduction.index_BK), torch.arange(4).expand(B, 4))
    assert ((hosts == (4 if fusion else -1)).sum(1) == N - 4).all()


@pytest.mark.parametrize(("selection", "largest"), [("attentive", True), ("inattentive", False)])
def test_the_attentive_or_the_inattentive_are_kept(score_BN, selection, largest):
    index_BK = plan(score_BN, selection=selection).index_BK.sort(1).values
    assert torch.equal(index_BK, score_BN.topk(4, largest=largest).indices.sort(1).values)


def test_random_selection_draws_without_repetition_whatever_the_scores(score_BN):
    torch.manual_seed(0)
    chosen = plan(score_BN, selection="random").index_BK
    torch.manual_seed(0)
    assert torch.equal(chosen, plan(torch.zeros(B, N), selection="random").index_BK)
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    assert not torch.equal(chosen.sort(1).values, plan(score_BN).index_BK.sort(1).values)
