"""DynamicViT, against outputs of the authors' code, and what its training rests on."""

import pytest
import timm
import torch

import evit
from evit.measure import count_macs, count_params
from evit.reducers.blocks import Step
from evit.reducers.dynamicvit import Predictor
from tests.models import golden

NAMES = ["dynamicvit_deit_small_patch16", "dynamicvit_lvvit_s"]
# 1e9 multiply-accumulates of the authors' code as fvcore counts it, which leaves out a little.
FVCORE = {
    "dynamicvit_deit_small_patch16": {0.9: 4.050, 0.8: 3.471, 0.7: 2.988, 0.6: 2.571, 0.5: 2.234},
    "dynamicvit_deit_base_patch16": {0.7: 11.489},
    "dynamicvit_lvvit_s": {0.7: 4.664, 0.5: 3.801},
}


def DynamicLVViT(**kwargs):
    return evit.LVViT(reducer="dynamicvit", **kwargs)


def forward_masked(model, images):
    """Normalised tokens, none removed, and the decisions."""
    x, decisions = model.reducer.masked_features(model, model.embed(images))
    return model.norm(x), decisions


def tiny(kind=evit.DynamicViT, **kwargs) -> evit.DynamicViT:
    torch.manual_seed(0)
    common = dict(img_size=64, embed_dim=48, depth=8, num_heads=3, num_classes=5, keep_rate=0.5)
    return kind(**common | kwargs)


def test_logits_and_kept_patches_are_those_of_the_authors_code():
    golden.assert_agrees(timm.create_model(NAMES[0], keep_rate=0.7), "dynamicvit_deit_s_k07")


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("dynamicvit_deit_small_patch16", 22_774_414),
        ("dynamicvit_deit_base_patch16", 89_452_846),
        ("dynamicvit_lvvit_s", 26_875_574),
    ],
)
def test_published_parameters(name, params):
    with torch.device("meta"):
        assert count_params(timm.create_model(name)) == params


def test_macs_are_what_torchprofile_counts_of_the_authors_code():
    with torch.device("meta"):
        assert round(count_macs(timm.create_model(NAMES[0], keep_rate=0.7)) / 1e9, 4) == 2.9836


@pytest.mark.parametrize("name", FVCORE)
def test_macs_are_near_those_that_fvcore_counts(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    for keep_rate, macs in FVCORE[name].items():
        model.set_keep_rate(keep_rate)
        assert count_macs(model) / 1e9 == pytest.approx(macs, rel=0.003)


@pytest.mark.parametrize("num_patches", [196, 256, 289, 324, 361, 576, 784])
def test_tokens_kept_are_the_authors_power_of_the_keep_rate(num_patches):
    model = tiny(img_size=224)
    for percent in range(20, 100, 5):
        model.set_keep_rate(percent / 100)
        powers = [int(num_patches * (percent / 100) ** s) for s in (1, 2, 3)]
        assert model.reducer.kept(num_patches) == powers


def test_one_rate_for_each_predictor():
    model = tiny(keep_rate=[1.0, 0.5, 0.5]).eval()
    _, kept = model(torch.randn(2, 3, 64, 64), return_kept=True)
    assert [ids.shape[1] for ids in kept] == [16, 8, 4]


@pytest.mark.parametrize("kind", [evit.DynamicViT, DynamicLVViT])
@torch.no_grad()
def test_keep_rate_1_is_the_dense_model(kind):
    dynamic = tiny(kind, keep_rate=1.0).eval()
    dense = tiny(evit.LVViT if kind is DynamicLVViT else evit.EViT, keep_rate=1.0).eval()
    weights = dynamic.state_dict()
    dense.load_state_dict({k: weights[k] for k in dense.state_dict()})
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(dynamic(images), dense(images))


@torch.no_grad()
def test_a_masked_token_is_seen_by_itself_alone():
    block, x = tiny().eval().blocks[0], torch.randn(2, 17, 48)
    kept = torch.ones(2, 17)
    kept[:, 5:] = 0
    masked = block(x, step=Step(1, mask_BT=kept))
    torch.testing.assert_close(masked[:, :5], block(x[:, :5]), atol=1e-5, rtol=1e-5)
    for token in range(5, 17):
        alone = block(x[:, [0, 1, 2, 3, 4, token]])[:, 5]
        torch.testing.assert_close(masked[:, token], alone, atol=1e-5, rtol=1e-5)
    block.attn.qkv.weight.mul_(1e3)  # logits whose exponentials are infinite
    assert block(x, step=Step(1, mask_BT=kept)).isfinite().all()


def test_a_token_once_dropped_stays_dropped():
    _, decisions = forward_masked(tiny().train(), torch.randn(4, 3, 64, 64))
    assert len(decisions) == 3
    assert all(((d == 0) | (d == 1)).all() for d in decisions)
    assert (decisions[1] <= decisions[0]).all() and (decisions[2] <= decisions[1]).all()
    assert 0 < decisions[2].mean() < decisions[0].mean()


@pytest.mark.parametrize("kind", [evit.DynamicViT, DynamicLVViT])
@pytest.mark.parametrize("img_size", [64, 80])
def test_every_parameter_receives_a_gradient_at_any_image_size(kind, img_size):
    model = tiny(kind, img_size=img_size).train()
    x, decisions = forward_masked(model, torch.randn(4, 3, img_size, img_size))
    (model.forward_head(x).square().sum() + sum(d.sum() for d in decisions)).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("kind", [evit.DynamicViT, DynamicLVViT])
@pytest.mark.parametrize("autocast", [True, False])
def test_training_in_bf16_has_no_nan(kind, autocast):
    model, images = tiny(kind).train(), 30 * torch.randn(8, 3, 64, 64)
    if not autocast:
        model, images = model.bfloat16(), images.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x, decisions = forward_masked(model, images)
        loss = model.forward_head(x).float().logsumexp(-1).sum() + sum(d.sum() for d in decisions)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_a_predictor_sees_the_mean_of_the_kept_tokens():
    predictor, x, kept = Predictor(48), torch.randn(2, 7, 48), torch.ones(2, 7)
    for weight in predictor.parameters():  # which are small at first, and so are differences
        weight.normal_()
    twice = predictor(torch.cat([x, x], 1), torch.ones(2, 14))
    near = dict(atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(twice[:, :7], predictor(x, kept), **near)
    kept[:, 5:] = 0
    torch.testing.assert_close(predictor(x, kept)[:, :5], predictor(x[:, :5], kept[:, :5]), **near)


def test_a_predictor_that_sees_no_kept_token_gives_numbers():
    assert Predictor(48)(torch.randn(2, 7, 48), torch.zeros(2, 7)).isfinite().all()


def test_fusion_is_accepted_and_without_effect():
    model = tiny(fusion=True)
    assert model.fusion is False
    assert model.tokens_per_block() == [16, 16, 8, 8, 4, 4, 2, 2]


def test_a_keep_rate_that_leaves_no_token_is_refused():
    with pytest.raises(ValueError, match=r"keep_rate \[0.3, 0.3, 0.3\] leaves 0 of 1 tokens"):
        tiny(keep_rate=0.3)


def test_a_dense_checkpoint_leaves_the_predictors_new():
    dense, model = tiny(evit.EViT), tiny()
    before = model.reducer.predictors[0].in_conv[1].weight.clone()
    with pytest.raises(ValueError, match="reducer.predictors.* is missing"):
        evit.load_checkpoint(model, dense.state_dict())
    evit.load_checkpoint(model, dense.state_dict(), new_parts=True)
    assert model.state_dict()["head.weight"].equal(dense.state_dict()["head.weight"])
    assert model.reducer.predictors[0].in_conv[1].weight.equal(before)


def test_half_a_predictor_is_refused_even_so():
    weights = tiny().state_dict()
    del weights["reducer.predictors.1.out_conv.0.weight"]
    with pytest.raises(ValueError, match="reducer.predictors.1.out_conv.0.weight is missing"):
        evit.load_checkpoint(tiny(), weights, new_parts=True)


@pytest.mark.parametrize("name", ["dynamicvit_deit_small_patch16", "dynamicvit_deit_base_patch16"])
def test_timm_knows_the_weights_of_the_backbone(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.hf_hub_id and cfg.num_classes == 1000
