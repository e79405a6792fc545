"""Multiply-accumulates, against what torchprofile 0.0.4 counts of the authors' code."""

import math

import pytest
import timm
import torch

import evit
from evit.measure import count_macs, count_params

RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
GMACS = {
    ("small", True): (4.6036, 4.0258, 3.4805, 3.0321, 2.6378, 2.3110),
    ("small", False): (4.6036, 3.9920, 3.4474, 2.9997, 2.6108, 2.2845),
    ("base", True): (17.5732, 15.4032, 13.3334, 11.6156, 10.0932, 8.8239),
    ("base", False): (17.5732, 15.2754, 13.2072, 11.4907, 9.9886, 8.7201),
    ("tiny", True): (1.2560, 1.0940, 0.9437, 0.8221, 0.7167, 0.6303),
    ("tiny", False): (1.2560, 1.0846, 0.9347, 0.8135, 0.7095, 0.6233),
}
LARGER = {(0.5, 256): 3.0600, (0.5, 288): 3.9475, (0.5, 304): 4.4426, (0.6, 256): 3.4914}
LARGER |= {(0.6, 288): 4.5057, (0.7, 272): 4.5652, (1.0, 384): 15.5199}


def build(size: str, **kwargs) -> evit.EViT:
    with torch.device("meta"):
        return timm.create_model(f"evit_deit_{size}_patch16", **kwargs)


@pytest.mark.parametrize(("size", "fusion"), GMACS)
def test_published_macs_at_every_keep_rate(size, fusion):
    model, counted = build(size, fusion=fusion), []
    for rate in RATES:
        model.set_keep_rate(rate)
        counted.append(round(count_macs(model) / 1e9, 4))
    assert tuple(counted) == GMACS[size, fusion]


@pytest.mark.parametrize(("rate", "img_size"), LARGER)
def test_published_macs_at_larger_images(rate, img_size):
    macs = count_macs(build("small", keep_rate=rate, img_size=img_size))
    assert round(macs / 1e9, 4) == LARGER[rate, img_size]


def test_macs_of_another_image_size_are_those_of_a_model_of_that_size():
    assert count_macs(build("tiny"), 304) == count_macs(build("tiny", img_size=304))


def executed_by_hand(rate: float, fusion: bool, d: int = 384) -> int:
    """DeiT-S at 224 px: only the class token leaves the last block; without fusion only kept tokens
    ask, with it the attention's output is projected after the fusion."""
    macs, t = 196 * 768 * d + d * 1000, 197
    for i in range(12):
        reorganizes, last = i in (3, 6, 9) and rate < 1, i == 11
        k = math.ceil(rate * (t - 1))
        leave = 1 if last else 1 + k + fusion if reorganizes else t
        ask = 1 if last else 1 + k if reorganizes and not fusion else t
        macs += (ask + 2 * t + leave) * d * d + 2 * ask * t * d + 8 * leave * d * d
        if reorganizes:
            macs += t * d  # the class token's row
            macs += 2 * (t - 1) * d if fusion else d * d  # two weighted sums, or its query
            t = leave
    return macs


@pytest.mark.parametrize("fusion", [True, False])
def test_executed_macs_leave_out_what_nothing_reads(fusion):
    model = timm.create_model("evit_deit_small_patch16", fusion=fusion)
    for rate in RATES:
        model.set_keep_rate(rate)
        assert count_macs(model, executed=True) == executed_by_hand(rate, fusion)


def test_executed_macs_leave_the_model_in_its_mode():
    model = timm.create_model("evit_deit_tiny_patch16").train()
    count_macs(model, executed=True)
    assert model.training


def test_a_model_without_a_published_count_says_what_to_do():
    with pytest.raises(ValueError, match="VisionTransformer.*executed=True"):
        count_macs(timm.create_model("vit_tiny_patch16_224"))


@pytest.mark.parametrize(
    ("size", "params"), [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)]
)
def test_published_parameters(size, params):
    assert count_params(build(size)) == params


def test_layer_scale_and_further_norms_are_counted():
    plain, extra = (
        evit.reduce(timm.create_model("vit_tiny_patch16_224", depth=1, **kwargs), at=[])
        for kwargs in ({}, dict(init_values=1e-5, qk_norm=True, pre_norm=True))
    )
    layer_scale, qk_norm, norm_pre = 2 * 197 * 192, 2 * 197 * 192, 197 * 192
    assert count_macs(extra) - count_macs(plain) == layer_scale + qk_norm + norm_pre
