"""Dense maps from reduced models: every patch is put back."""

import pytest
import timm
import torch

import evit
from evit.reducers import REDUCERS
from tests.reducers.tiny import images, reduced, run, vit

every = pytest.mark.parametrize("name", sorted(REDUCERS))


@torch.no_grad()
def test_at_rate_1_all_calls_are_timms():
    dense, model, x = vit(reg_tokens=2), vit(reg_tokens=2), images()
    evit.reduce(model, "cover", keep_rate=1)
    for options in (dict(norm=True), dict(output_fmt="NLC"), dict(return_prefix_tokens=True)):
        wanted = dense.forward_intermediates(x, indices=[1, 3], **options)
        torch.testing.assert_close(model.forward_intermediates(x, [1, 3], **options), wanted)
    wanted = dense.forward_intermediates(x, 2, return_prefix_tokens=True)
    found = model.forward_intermediates(x, 2, return_prefix_tokens=True)
    torch.testing.assert_close(found, wanted)
    wanted = dense.get_intermediate_layers(x, 2, reshape=True, norm=True)
    torch.testing.assert_close(model.get_intermediate_layers(x, 2, reshape=True, norm=True), wanted)
    logits, map_ = model(x, return_map=True)
    torch.testing.assert_close(logits, dense(x))
    torch.testing.assert_close(map_, dense.forward_intermediates(x, 1, norm=True)[1][0])


@every
@torch.no_grad()
def test_each_patch_has_the_token_that_it_went_into_or_its_last_state(name):
    model, x = reduced(name), images()
    _, source, map_ = run(model, x, return_source=True, return_map=True)
    final = run(model.forward_features, x)
    states = run(model.forward_intermediates, x, output_fmt="NLC", intermediates_only=True)
    flat = map_.flatten(2).mT
    for b, n in torch.cartesian_prod(torch.arange(2), torch.arange(source.shape[1])).tolist():
        token = source[b, n]
        if token >= 0:
            torch.testing.assert_close(flat[b, n], final[b, token])
        else:  # nothing changes it after it was dropped
            stays = [torch.equal(state[b, n], states[-1][b, n]) for state in states]
            assert stays.index(True) < 3 and all(stays[stays.index(True) :])


@torch.no_grad()
def test_prefix_tokens_stay_apart():
    model, x = reduced("drop", vit(reg_tokens=2)), images()
    (map_, prefix), *_ = model.forward_intermediates(
        x, [4], return_prefix_tokens=True, intermediates_only=True
    )
    assert map_.shape == (2, 48, 8, 8) and prefix.shape == (2, 3, 48)


@pytest.mark.parametrize("name", ["evit_deit_tiny_patch16", "evit_lvvit_s"])
@torch.no_grad()
def test_features_only_gives_maps(name):
    size = dict(img_size=64, embed_dim=48, depth=4, num_heads=3)
    model = timm.create_model(name, features_only=True, out_indices=(1, 2), **size, keep_rate=0.5)
    assert [tuple(map_.shape) for map_ in model(images(2, 64))] == [(2, 48, 4, 4)] * 2


@torch.no_grad()
def test_a_map_exports():
    model, x = reduced("cover"), images(4)

    class Mapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, return_map=True)[1]

    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Mapped(), (x[:2],), dynamic_shapes={"x": {0: batch}})
    torch.testing.assert_close(exported.module()(x), Mapped()(x))
