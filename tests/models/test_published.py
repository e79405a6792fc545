"""The models against the published algorithm, written out plainly in published.py."""

import pytest
import timm
import torch

import evit
from tests.models.published import published_forward

KINDS = {
    "deit": lambda **kwargs: evit.EViT(patch_size=4, embed_dim=48, num_heads=3, **kwargs),
    "lvvit": lambda **kwargs: evit.LVViT(embed_dim=48, num_heads=3, **kwargs),
}


def trained_like(model: evit.EViT, seed: int) -> evit.EViT:
    """The model with weights of unit gain: unlike fresh ones, they attend to some patches more."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        z = torch.randn(weight.shape, generator=generator)
        gain = 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5
        weight.data = (gain * z + (weight.ndim == 1) * weight).detach()
    return model.eval()


@torch.no_grad()
def assert_agrees(model: evit.EViT, batch: int, seed: int, atol: float) -> None:
    images = torch.randn(
        batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(seed)
    ).to(model.cls_token)
    expected, expected_kept = published_forward(model, images)
    logits, kept = model(images, return_kept=True)
    for found in (logits, model(images)):
        torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    for ids, wanted in zip(kept, expected_kept, strict=True):
        assert torch.equal(ids.sort().values, wanted.sort().values)


@pytest.mark.parametrize(("patches", "batch"), [((4, 4), 1), ((9, 9), 2), ((5, 8), 5)], ids=str)
@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("keep_rate", [1.0, 0.7, 0.5, 0.1, [0.5, 1.0, 0.3]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_model_agrees_in_double_precision(kind, keep_rate, fusion, patches, batch):
    """In double precision, where no two scores are so close that rounding decides."""
    side = {"deit": 4, "lvvit": 16}[kind]
    size = (patches[0] * side, patches[1] * side)
    model = KINDS[kind](
        img_size=size, depth=8, num_classes=7, keep_rate=keep_rate, fusion=fusion
    ).double()
    assert_agrees(trained_like(model, seed=1).double(), batch, seed=2, atol=1e-9)


@pytest.mark.parametrize("drop_loc", [(0, 3, 7), (7,), (5, 6, 7), ()], ids=str)
def test_wherever_it_reorganizes(drop_loc):
    """The first and the last block too."""
    model = KINDS["deit"](img_size=32, depth=8, num_classes=7, keep_rate=0.6, drop_loc=drop_loc)
    assert_agrees(trained_like(model, seed=3).double(), 2, seed=4, atol=1e-9)


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize(("keep_rate", "img_size"), [(0.7, 224), (0.5, 304)])
def test_deit_s_agrees_in_single_precision(keep_rate, img_size, fusion):
    model = timm.create_model(
        "evit_deit_small_patch16", keep_rate=keep_rate, img_size=img_size, fusion=fusion
    )
    assert_agrees(trained_like(model, seed=5), 2, seed=6, atol=1e-5)
