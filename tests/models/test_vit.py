"""EViT against the authors' outputs, timm's DeiT, and its own contract."""

import numpy as np
import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evit
from evit import reducers
from evit.models.registry import check_images
from evit.reducers.blocks import feed_forward
from tests.models import golden

CASES = sorted(path.stem for path in golden.FOLDER.glob("*.npz"))
CASES = [name for name in CASES if golden.load(name)[0]["kind"] == "evit"]
ARGUMENTS = "img_size patch_size embed_dim depth num_heads num_classes keep_rate drop_loc fusion"


def tiny(**kwargs) -> evit.EViT:
    torch.manual_seed(0)
    args = dict(img_size=32, patch_size=4, embed_dim=48, depth=12, num_heads=3, num_classes=7)
    return evit.EViT(**args | kwargs)


def pictures(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_there_are_golden_cases_of_every_setting():
    settings = {
        (m["fusion"], m["img_size"] == m["checkpoint_img_size"])
        for m in (golden.load(name)[0] for name in CASES)
    }
    assert {(True, True), (False, True), (True, False)} <= settings


@pytest.mark.parametrize("name", CASES)
def test_logits_and_kept_patches_are_those_of_the_authors_code(name):
    meta, _ = golden.load(name)
    golden.assert_agrees(evit.EViT(**{key: meta[key] for key in ARGUMENTS.split()}), name)


@torch.no_grad()
def test_keep_rate_1_is_timms_deit():
    dense = timm.create_model("deit_small_patch16_224").eval()
    model = timm.create_model("evit_deit_small_patch16", keep_rate=1.0).eval()
    evit.load_checkpoint(model, dense.state_dict())
    images = pictures(size=224)
    torch.testing.assert_close(model(images), dense(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_parameters_have_the_names_and_shapes_of_timms_deit(size):
    with torch.device("meta"):
        dense = timm.create_model(f"deit_{size}_patch16_224")
        model = timm.create_model(f"evit_deit_{size}_patch16")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (dense, model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("fusion", [True, False])
def test_every_parameter_receives_a_gradient(fusion):
    model = tiny(keep_rate=0.5, fusion=fusion, drop_path_rate=0.0)
    model(pictures()).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@torch.no_grad()
@pytest.mark.parametrize("keep_rate", [0.5, [0.9, 0.6, 0.3], 1.0])
@pytest.mark.parametrize("fusion", [True, False])
def test_kept_are_ids_of_patches_and_follow_one_another(fusion, keep_rate):
    model = tiny(keep_rate=keep_rate, fusion=fusion).eval()
    _, kept = model(pictures(), return_kept=True)
    counts = [model.tokens_per_block()[i] for i in model.drop_loc]
    before = [set(range(64))] * 2
    for i, (ids, count, rate) in enumerate(zip(kept, counts, model.keep_rate, strict=True)):
        assert ids.dtype == torch.int64
        assert ids.shape == (2, count - (fusion and rate < 1))
        after = [set(row.tolist()) - {-1} for row in ids]
        assert all(a <= b for a, b in zip(after, before, strict=True))
        assert all((row == -1).sum() <= (i if fusion else 0) for row in ids)
        before = after


@torch.no_grad()
def test_the_most_attended_patches_survive():
    """A patch whose key is a copy of the class token's query cannot be dropped."""
    model = tiny(keep_rate=0.2, fusion=False).eval()
    loud = 37
    for i in model.drop_loc:
        model.blocks[i].attn.qkv.weight[48:96].copy_(model.blocks[i].attn.qkv.weight[:48] * 50)
    model.pos_embed[:, 1 + loud] = model.pos_embed[:, 0] = 5 * torch.randn(48)
    _, kept = model(torch.zeros(2, 3, 32, 32), return_kept=True)
    assert all((ids == loud).any(1).all() for ids in kept)


@torch.no_grad()
def test_set_keep_rate_takes_effect_at_the_next_forward():
    model, images = tiny(keep_rate=0.9).eval(), pictures()
    before = model(images)
    model.set_keep_rate([0.5, 0.4, 0.3])
    assert [k.shape[1] for k in model(images, return_kept=True)[1]] == [32, 14, 5]
    model.set_keep_rate(0.9)
    torch.testing.assert_close(model(images), before)


@torch.no_grad()
@pytest.mark.parametrize("keep_rate", [1.0, 0.7, 0.5])
def test_published_token_counts(keep_rate):
    expected = {1.0: [196] * 3, 0.7: [139, 99, 71], 0.5: [99, 51, 27]}[keep_rate]
    model = timm.create_model("evit_deit_tiny_patch16", keep_rate=keep_rate)
    assert [model.tokens_per_block()[i] for i in (3, 6, 9)] == expected


@torch.no_grad()
def test_no_attention_matrix_is_materialised():
    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.ndim >= 3 and out.shape[-1] == out.shape[-2]:
                square.append((str(func), tuple(out.shape)))
            return out

    square: list[tuple[str, tuple[int, ...]]] = []
    model, images = tiny(keep_rate=0.7).eval(), pictures()
    with Shapes():
        model(images)
    assert [shape for _, shape in square if shape[-1] > 32] == []


@torch.no_grad()
def test_gradient_checkpointing_gives_the_same_gradients():
    def gradient(checkpointing: bool):
        model = tiny(keep_rate=0.5)
        model.set_grad_checkpointing(checkpointing)
        with torch.enable_grad():
            return torch.autograd.grad(model(pictures()).sum(), model.pos_embed)[0]

    torch.testing.assert_close(gradient(True), gradient(False))


@torch.no_grad()
def test_rectangular_images_of_another_grid():
    model = tiny(img_size=(32, 48), keep_rate=0.5).eval()
    _, kept = model(torch.randn(1, 3, 32, 48), return_kept=True)
    assert kept[0].shape == (1, 48)


@pytest.mark.parametrize("bad", [0, 1.5, -0.1, "lots", True, [0.5, 1.2, 0.5], float("nan")])
def test_a_bad_keep_rate_is_named(bad):
    with pytest.raises(ValueError, match=r"keep_rate must be in \(0, 1\].*got"):
        tiny(keep_rate=bad)


def test_numpy_s_numbers_are_numbers():
    assert tiny(keep_rate=np.float32(0.5)).keep_rate == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(patch_drop_rate=0.5), "patch_drop_rate drops patches at random"),
    ],
)
def test_what_does_not_go_with_reorganization_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


def test_a_keep_rate_for_each_reorganization_needs_as_many():
    with pytest.raises(ValueError, match=r"each of 3 reorganizations, got \[0.5, 0.5\]"):
        tiny(keep_rate=[0.5, 0.5])


def test_an_image_size_off_the_patch_grid_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match="img_size 225 .* 224 or 240"):
        timm.create_model("evit_deit_tiny_patch16", img_size=225)


def test_the_reducer_is_a_name_with_its_options_or_one_that_is_made_or_none():
    assert tiny(reducer=None, keep_rate=0.5).keep_rate == (1.0, 1.0, 1.0)
    model = tiny(reducer="cover", keep_rate=0.5, drop_loc=[2], size_power=0.1)
    assert (model.keep_rate, model.drop_loc, model.reducer.size_power) == ((0.5,), (2,), 0.1)
    assert tiny().fusion is True and tiny(fusion=False).fusion is False
    made = reducers.make("tome", r=3)
    assert tiny(reducer=made).reducer is made


@pytest.mark.parametrize("knob", [dict(keep_rate=0.5), dict(drop_loc=[2]), dict(fusion=False)])
def test_what_a_reducer_that_is_made_would_ignore_is_refused(knob):
    with pytest.raises(ValueError, match=f"{next(iter(knob))} is the reducer's"):
        tiny(reducer=reducers.make("evit"), **knob)
    if "keep_rate" in knob:
        with pytest.raises(ValueError, match="keep_rate is the reducer's"):
            evit.reduce(tiny(), reducers.make("evit"), **knob)


@pytest.mark.parametrize("bad", [[3, 3], [9, 6], [12], [-1]])
def test_a_bad_drop_loc_is_named(bad):
    with pytest.raises(ValueError, match="at must be ascending block numbers from 0 to 11"):
        tiny(drop_loc=bad)


def test_gelu_overwrites_its_input_only_while_no_gradients_are_recorded():
    """feed_forward gives what timm's Mlp gives, and the Mlp stays timm's."""
    mlp, x = tiny().blocks[0].mlp, torch.randn(2, 5, 48)
    expected = mlp(x)
    assert type(mlp.act) is torch.nn.GELU and torch.equal(feed_forward(mlp, x), expected)
    with torch.no_grad():
        assert torch.equal(feed_forward(mlp, x), expected)


def test_an_activation_of_another_kind_stays():
    assert type(tiny(act_layer=torch.nn.SiLU).blocks[0].mlp.act) is torch.nn.SiLU


def test_square_rgb_images_alone_are_read():
    check_images(tiny(), 32)
    for options, reason in ((dict(in_chans=1), "in_chans=1"), (dict(img_size=64), r"\[64, 64\]")):
        with pytest.raises(ValueError, match=reason):
            check_images(tiny(**options), 32)
