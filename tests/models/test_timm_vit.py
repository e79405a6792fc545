"""model=timm_vit: timm's ViTs by name."""

import pytest
import timm
import torch

import evit
from evit.models.registry import reduced

SMALL = dict(img_size=32, depth=4, num_classes=3)


def test_a_timm_vit_by_name_is_its_evit_and_dense_its_own():
    torch.manual_seed(0)
    model = reduced("vit_tiny_patch16_224", keep_rate=0.5, drop_loc=[1, 2], **SMALL).eval()
    assert isinstance(model, evit.EViT)
    assert (model.keep_rate, model.drop_loc, model.fusion) == ((0.5, 0.5), (1, 2), True)
    plain = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        sparse = model(images)
        model.set_keep_rate(1)
        torch.testing.assert_close(model(images), plain(images))
    assert not torch.allclose(sparse, plain(images))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_223", {}, r"Unknown model \(vit_tiny_patch16_223\)"),
        ("vit_tiny_patch16_224", dict(img_size=40), "img_size 40 is not a multiple .* 32 or 48"),
        ("vit_tiny_patch16_224", dict(keep_rate=2), r"keep_rate must be in \(0, 1\]"),
        ("resnet18", dict(img_size=None, depth=None), "is not a timm VisionTransformer"),
    ],
)
def test_what_cannot_be_served_is_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        reduced(name, **SMALL | options)
