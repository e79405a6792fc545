"""evit.reduce on timm's own Vision Transformers."""

import pytest
import timm
import torch

import evit

# What each adds to a plain ViT, at a size that runs in no time.
MODELS = {
    "deit_tiny_distilled_patch16_224": {},  # a distillation token, two heads
    "deit3_small_patch16_224": {},  # LayerScale, class token without position
    "vit_small_patch14_dinov2": {},  # LayerScale, patches of 14
    "vit_small_patch14_reg4_dinov2": {},  # four registers
    "vit_base_patch32_clip_224": {},  # norm before the blocks
    "vit_tiny_patch16_224": {},  # augreg
    "vit_wee_patch16_reg1_gap_256": dict(class_token=True, reg_tokens=1),  # qk-norm? average pool
    "vit_tiny_patch16_224 qk_norm": dict(qk_norm=True, drop_path_rate=0.1),
    "vit_tiny_patch16_224 dynamic": dict(dynamic_img_size=True),
}


def build(name: str):
    torch.manual_seed(0)
    size = dict(img_size=224) if "dinov2" in name else {}
    kwargs = dict(num_classes=7, depth=4) | size | MODELS[name]
    return timm.create_model(name.split()[0], **kwargs).eval()


def picture(model):
    return torch.randn(2, 3, *model.patch_embed.img_size)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_keep_rate_1_is_the_model_itself(name):
    model, images = build(name), None
    images = picture(model)
    dense = model(images)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    reorganized = evit.reduce(model, keep_rate=1.0)
    assert reorganized is model
    torch.testing.assert_close(model(images), dense, atol=1e-5, rtol=0)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fusion", [True, False])
@torch.no_grad()
def test_prefix_tokens_are_kept_and_do_not_count(name, fusion):
    model = build(name)
    dense, images = model, picture(model)
    evit.reduce(dense, keep_rate=0.5, fusion=fusion)
    features = model.forward_features(images)
    logits, kept = model(images, return_kept=True)
    n = model.patch_embed.num_patches
    assert kept[0].shape[1] == -(-n // 2)
    assert features.shape[1] == model.num_prefix_tokens + model.tokens_per_block()[-1]
    assert logits.shape == (2, 7) and logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_trains_with_every_parameter_of_the_blocks(name):
    model = evit.reduce(build(name), keep_rate=0.5).train()
    out = model(picture(model))
    (sum(out) if isinstance(out, tuple) else out).square().sum().backward()
    dead = [n for n, p in model.blocks.named_parameters() if p.grad is None]
    assert dead == []


@torch.no_grad()
def test_images_of_another_size_where_the_model_takes_them():
    model = evit.reduce(build("vit_tiny_patch16_224 dynamic"), keep_rate=0.5)
    _, kept = model(torch.randn(1, 3, 160, 160), return_kept=True)
    assert kept[0].shape == (1, 50)


def test_a_model_may_be_reorganized_again():
    model = evit.reduce(build("vit_tiny_patch16_224"))
    kind = type(model)
    evit.reduce(model, keep_rate=0.3, at=[1])
    assert (type(model), model.keep_rate, model.drop_loc) == (kind, (0.3,), (1,))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch16_36x1_224", None),
        ("vit_medium_patch16_gap_240", None),
        ("resnet18", "ResNet of timm is not a timm VisionTransformer"),
        ("vit_small_resnet26d_224", None),
        ("vit_base_patch16_rpn_224", "is a ResPostBlock, which is not supported"),
        ("vit_small_patch16_18x2_224", "is a ParallelThingsBlock, which is not supported"),
    ],
)
def test_models_that_cannot_be_served_are_named(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    if reason is None:
        evit.reduce(model)
        return
    with pytest.raises(ValueError, match=reason):
        evit.reduce(model)


def test_reorganize_is_evit():
    model = evit.reorganize(build("vit_tiny_patch16_224"), 0.6, fusion=False, drop_loc=[1, 2])
    reducer = evit.reducers.EViT(keep_rate=[0.6, 0.6], at=[1, 2], fusion=False)
    assert (
        model.reducer.config()
        == evit.reduce(build("vit_tiny_patch16_224"), reducer).reducer.config()
    )
