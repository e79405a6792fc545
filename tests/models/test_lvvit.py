"""LV-ViT and EViT on it, against outputs of the authors' blocks."""

import pytest
import timm
import torch

import evit
from evit.measure import count_macs, count_params
from tests.models import golden

# 1e9 multiply-accumulates at (keep rate, pixels): torchprofile's count of the authors' dense model,
# and the published tables below it.
GMACS = {(1.0, 224): 6.558, (0.7, 224): 4.712, (0.5, 224): 3.879, (0.9, 240): 6.789}
GMACS |= {(0.8, 256): 6.926, (0.7, 256): 6.223, (0.7, 272): 7.073, (0.5, 304): 7.384}
GMACS |= {(0.7, 448): 21.535, (1.0, 384): 21.914}


def tiny(**kwargs) -> evit.LVViT:
    torch.manual_seed(0)
    return evit.LVViT(
        **dict(img_size=64, embed_dim=48, depth=8, num_heads=3, num_classes=5) | kwargs
    )


@pytest.mark.parametrize("name", ["lvvit_s_dense", "evit_lvvit_s_k05_fuse_304"])
def test_logits_and_kept_patches_are_those_of_the_authors_blocks(name):
    meta, _ = golden.load(name)
    model = timm.create_model(
        "evit_lvvit_s", img_size=meta["img_size"], keep_rate=(meta["keep_rate"] or [1.0])[0]
    )
    assert model.drop_loc == tuple(meta["drop_loc"] or (4, 8, 12))
    golden.assert_agrees(model, name)


@pytest.mark.parametrize(
    ("size", "params"), [("t", 8_534_720), ("s", 26_151_824), ("m", 55_830_544)]
)
def test_published_parameters(size, params):
    with torch.device("meta"):
        assert count_params(timm.create_model(f"lvvit_{size}")) == params


@pytest.mark.parametrize(("keep_rate", "img_size"), GMACS)
def test_published_macs(keep_rate, img_size):
    with torch.device("meta"):
        model = timm.create_model("evit_lvvit_s", keep_rate=keep_rate, img_size=img_size)
    assert round(count_macs(model) / 1e9, 3) == pytest.approx(GMACS[keep_rate, img_size], abs=1e-3)


@pytest.mark.parametrize(
    ("size", "drop_loc"), [("t", (3, 6, 9)), ("s", (4, 8, 12)), ("m", (5, 10, 15))]
)
def test_reorganizations_stand_in_proportion_to_the_depth(size, drop_loc):
    with torch.device("meta"):
        assert timm.create_model(f"evit_lvvit_{size}").drop_loc == drop_loc
        assert timm.create_model(f"lvvit_{size}").keep_rate == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("fusion", [True, False])
def test_every_parameter_receives_a_gradient(fusion):
    model = tiny(keep_rate=0.5, fusion=fusion)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@torch.no_grad()
def test_skip_lam_divides_both_residual_branches():
    model = tiny(depth=1, drop_loc=[], skip_lam=4.0).eval()
    block, x = model.blocks[0], torch.randn(2, 17, 48)
    middle = x + block.attn(block.norm1(x)) / 4
    torch.testing.assert_close(block(x), middle + block.mlp(block.norm2(middle)) / 4)


def test_another_number_of_classes_replaces_both_heads():
    model = tiny()
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_pretrained_says_where_weights_come_from():
    with pytest.raises(ValueError, match="checkpoint=PATH"):
        evit.models.create_model("lvvit_s", pretrained=True)


def test_another_patch_size_is_refused():
    with pytest.raises(ValueError, match="patches of 16 pixels, not 8"):
        tiny(patch_size=8)
