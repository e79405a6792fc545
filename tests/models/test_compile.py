"""torch.compile: one graph, the same numbers, a compilation for each keep rate and no more."""

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

import evit


def DynamicLVViT(**kwargs):
    return evit.LVViT(reducer="dynamicvit", **kwargs)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def tiny(kind, **kwargs):
    torch.manual_seed(0)
    common = dict(img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=5, keep_rate=0.5)
    return kind(**common | kwargs)


def compiled(model: torch.nn.Module) -> CompileCounter:
    counter = CompileCounter()
    model.compile(backend=counter, fullgraph=True, dynamic=False)
    return counter


@pytest.mark.parametrize("kind", [evit.EViT, evit.LVViT, evit.DynamicViT, DynamicLVViT])
@pytest.mark.parametrize("fusion", [True, False])
@torch.no_grad()
def test_inference_is_one_graph_with_the_same_numbers(kind, fusion):
    model, images = tiny(kind, fusion=fusion).eval(), torch.randn(2, 3, 64, 64)
    expected = model(images)
    counter = compiled(model)
    torch.testing.assert_close(model(images), expected)
    assert counter.frame_count == 1


@torch.no_grad()
def test_each_keep_rate_is_compiled_once():
    model, images = tiny(evit.EViT).eval(), torch.randn(2, 3, 64, 64)
    counter = compiled(model)
    for rate in (0.5, 0.7, 0.5, [0.9, 0.7, 0.5], 0.7, 1.0, 1.0):
        model.set_keep_rate(rate)
        model(images)
    assert counter.frame_count == 4


@pytest.mark.parametrize("kind", [evit.EViT, evit.LVViT])
def test_training_is_one_graph_with_the_same_gradients(kind):
    images, gradients = torch.randn(2, 3, 64, 64), []
    for compile in (False, True):
        model = tiny(kind).train()
        counter = compiled(model) if compile else None
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert counter is not None and counter.frame_count == 1
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_reorganized_timm_vit_is_one_graph():
    model = evit.reduce(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4)).eval()
    counter = compiled(model)
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert counter.frame_count == 1


def test_the_executed_macs_of_a_compiled_model_are_those_of_the_plain_one():
    model = tiny(evit.EViT)
    expected = evit.measure.count_macs(model, executed=True)
    compiled(model)
    assert evit.measure.count_macs(model, executed=True) == expected


@pytest.mark.slow
@torch.no_grad()
def test_inductor_gives_the_same_numbers():
    model, images = tiny(evit.EViT).eval(), torch.randn(2, 3, 64, 64)
    expected = model(images)
    model.compile(fullgraph=True, dynamic=False)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-4)
