"""What a reducer cannot serve: one line that names the value and the way out."""

import pytest
import timm
import torch

import evit
from tests.reducers.tiny import AT, images, reduced, vit


def refused(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tom", "", "EViT2", None])
def test_an_unknown_name_is_named_with_those_that_there_are(name):
    refused(f"{name!r}.*cover.*dynamicvit.*tome", evit.reduce, vit(), name)


@pytest.mark.parametrize(
    ("name", "option", "known"),
    [
        ("evit", dict(keeprate=0.5), "fusion"),
        ("tome", dict(fusion=True), "prop_attn"),
        ("drop", dict(r=3), "keep_rate"),
        ("mctf", dict(tau=1), "tau_sim"),
    ],
)
def test_an_option_that_a_method_lacks_is_named_with_those_that_it_has(name, option, known):
    refused(f"{name}.*{next(iter(option))}.*{known}", evit.reduce, vit(), name, **option)


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        ([24, 40, 14], "descend|ascend|grow|more"),
        ([40, 24, 0], r"\b0\b"),
        ([40, 24, -1], "-1"),
        ([40, 24], r"\[40, 24\] .* each of 3 places"),
        ([65, 24, 14], "64"),
        ([40, 24.5, 14], "24.5"),
        ("lots", "lots"),
        (40, "40"),
    ],
)
@pytest.mark.parametrize("name", ["drop", "tome", "dynamicvit"])
def test_bad_counts_are_named(name, counts, why):
    refused(f"counts.*({why})", evit.reduce, vit(), name, counts=counts, at=AT)


@pytest.mark.parametrize("rate", [0, 1.5, -0.1, "lots", True, [0.5, 1.2, 0.5], float("nan")])
@pytest.mark.parametrize("name", ["evit", "tome"])
def test_a_bad_keep_rate_is_named(name, rate):
    match = r"keep_rate must be in \(0, 1\].*got"
    refused(match, evit.reduce, vit(), name, keep_rate=rate, at=AT)
    model = reduced(name)
    refused(match, model.set_keep_rate, rate)
    assert model.reducer.counts(64) == reduced(name).reducer.counts(64)


def test_a_rate_for_each_place_needs_as_many():
    refused("each of 3 reorganizations", evit.reduce, vit(), "tome", keep_rate=[0.5, 0.5], at=AT)


@pytest.mark.parametrize("at", [[3, 3], [4, 1], [5], [-1], ["last"]])
def test_bad_places_are_named(at):
    match = "at must be ascending block numbers from 0 to 4, got"
    refused(match, evit.reduce, vit(), "merge", at=at)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tome", dict(r=-1)),
        ("tome", dict(r=[3] * 6)),  # for 5 blocks
        ("tome", dict(r="3")),
        ("pitome", dict(ratio=0)),
        ("pitome", dict(ratio=1.5)),
        ("mctf", dict(tau_sim=0)),
        ("evit", dict(selection="best")),
        ("diffrate", dict(prune_counts=[65] * 5)),  # without merge_counts
        ("diffrate", dict(prune_counts=[65] * 4, merge_counts=[65] * 5)),
        ("diffrate", dict(prune_counts=[60] * 5, merge_counts=[62] * 5)),
        ("diffrate", dict(prune_counts=[60] * 5, merge_counts=[1] * 5)),  # the class token alone
    ],
)
def test_a_value_that_a_method_cannot_serve_is_named(name, options):
    refused("|".join(options), evit.reduce, vit(), name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("evit", dict(keep_rate=1)),
        ("drop", dict(counts=[64, 1, 1], at=AT)),
        ("tome", dict(r=0)),
        ("tome", dict(r=[3] * 5)),
        ("pitome", dict(ratio=0.5)),
        ("pitome", dict(ratio=1)),
        ("diffrate", dict(prune_counts=[2] * 5, merge_counts=[2] * 5)),
    ],
)
@torch.no_grad()
def test_the_last_value_that_can_be_served_is(name, options):
    assert evit.reduce(vit(), name, **options)(images()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("resnet18", {}, "ResNet.*not a timm VisionTransformer.*timm"),
        ("vit_tiny_patch16_224", dict(patch_drop_rate=0.5), "patch_drop_rate"),
        ("vit_small_patch16_18x2_224", {}, "ParallelThingsBlock"),
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer.*not a timm VisionTransformer"),
    ],
)
@pytest.mark.parametrize("method", ["drop", "tome"])
def test_a_model_that_cannot_be_served_is_named(name, options, reason, method):
    with torch.device("meta"):
        refused(reason, evit.reduce, timm.create_model(name, **options), method)
