"""The fast path: the patch embedding as one product, and operations counted."""

from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch.utils._python_dispatch import TorchDispatchMode

import evit
from evit.models.reduced import PatchConv2d
from evit.reducers.blocks import Step
from tests.models.published import attend, reorganize

SIZE = dict(img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=3, num_classes=7)
VIEWS = "view _unsafe_view transpose permute expand slice unsqueeze squeeze select t unbind detach"


class Operations(TorchDispatchMode):
    """Count what launches a kernel on a GPU: every operation but views."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def operations(function) -> int:
    with torch.no_grad(), Operations() as seen:
        function()
    return sum(n for name, n in seen.count.items() if name not in VIEWS.split())


def published_block(block, x, keep_rate, fusion):
    attended, attention = attend(block.attn, block.norm1(x))
    ids = torch.arange(x.shape[1] - 1).expand(len(x), -1)
    x, _, _ = reorganize(x + block.ls1(attended), ids, attention, keep_rate, fusion)
    return x + block.ls2(block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)))))


@pytest.mark.parametrize(("fusion", "frozen"), [(True, 27), (False, 23)])
def test_a_reducing_block_has_as_few_operations_as_the_published_one(fusion, frozen):
    model = evit.EViT(**SIZE, keep_rate=0.5, fusion=fusion, drop_loc=[1]).eval()
    block, x = model.blocks[1], torch.randn(2, 65, 48)
    ours = operations(lambda: block(x, step=Step(1, model.reducer, 0, 32)))
    assert ours == frozen
    assert ours <= operations(lambda: published_block(block, x, 0.5, fusion))


PATCHES = {
    "flat": {},
    "norm": dict(norm_layer=torch.nn.LayerNorm),
    "NHWC": dict(output_fmt="NHWC", strict_img_size=False),
    "padded": dict(dynamic_img_pad=True, img_size=(30, 33)),
    "no bias": dict(bias=False, in_chans=1),
    "another size": dict(strict_img_size=False, img_size=64),
}


@pytest.mark.parametrize("case", PATCHES)
def test_a_patch_embedding_as_one_product_is_the_convolution(case, monkeypatch):
    options = dict(img_size=(32, 24), patch_size=8, embed_dim=20) | PATCHES[case]
    embed, x = PatchEmbed(**options), torch.randn(2, options.get("in_chans", 3), 32, 24)
    if case == "padded":
        x = torch.randn(2, 3, 30, 33)
    expected = embed(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in embed.parameters()]
    embed.zero_grad()
    embed.proj.__class__ = PatchConv2d
    monkeypatch.setattr(PatchConv2d, "forward", PatchConv2d.product)
    out = embed(x)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    for p, gradient in zip(embed.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-5)


def test_patch_embeddings_that_tile_are_products_and_keep_their_names():
    model = evit.EViT(**SIZE)
    assert type(model.patch_embed.proj) is PatchConv2d
    assert model.state_dict().keys() == timm.models.VisionTransformer(**SIZE).state_dict().keys()
    assert type(evit.LVViT(img_size=32, embed_dim=48, depth=4, num_heads=3).patch_embed.proj) is (
        PatchConv2d
    )


def test_a_model_with_the_product_exports_with_a_dynamic_batch(monkeypatch):
    monkeypatch.setattr(PatchConv2d, "forward", PatchConv2d.product)
    model, x = evit.EViT(**SIZE, keep_rate=0.5).eval(), torch.randn(5, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x[:2],), dynamic_shapes={"x": {0: batch}})
    torch.testing.assert_close(exported.module()(x), model(x), atol=1e-5, rtol=1e-5)
