"""Pictures of what survives: each cell where it belongs, each weight as the algorithm has it."""

import numpy as np
import pytest
import torch

import evit
from evit.models import DynamicViT
from evit.models.registry import reduced
from evit.report import pictures
from evit.report.pictures import FADED, FONT, GAP, MIN_SIDE, SQUARE, draw_kept, follow
from tests.models import published

SMALL = dict(embed_dim=48, depth=4, num_heads=3, num_classes=5)
GRAY = 100


def deit(img_size, **options) -> evit.EViT:
    return evit.EViT(img_size, **SMALL | options)


MODELS = {
    "28 px": lambda: deit(28, patch_size=7, keep_rate=0.6),
    "224 px": lambda: deit(224, keep_rate=0.7),
    "304 px, dropped": lambda: deit(304, keep_rate=0.5, fusion=False),
    "one rate for each, one of them 1": lambda: deit(96, keep_rate=[0.5, 1.0, 0.5]),
    "wide": lambda: deit((32, 96), keep_rate=0.5),
    "LV-ViT": lambda: evit.LVViT(64, keep_rate=0.6, **SMALL),
    "DynamicViT": lambda: DynamicViT(96, keep_rate=0.7, **SMALL),
    "timm, with registers": lambda: reduced(
        "vit_tiny_patch16_224", keep_rate=0.6, img_size=96, reg_tokens=2, **SMALL
    ),
}


@pytest.fixture(params=MODELS)
def model(request) -> evit.EViT:
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for block in model.blocks:  # at their initial scale all tokens would score about the same
        block.attn.qkv.weight.data *= 10
    return model.eval()


def images_for(model: evit.EViT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, *model.patch_embed.img_size, generator=generator)


def cell(picture: np.ndarray, size: tuple[int, int], row: int, column: int) -> np.ndarray:
    """The pixels of an image's place in a picture with rows of three."""
    zoom = -(-MIN_SIDE // size[1])
    height, width = size[0] * zoom + GAP, size[1] * zoom + GAP
    top, left = len(picture) - (3 - row) * height, GAP + column * width
    return picture[top : top + height - GAP, left : left + width - GAP]


@torch.no_grad()
def test_the_faded_patches_are_those_that_do_not_survive(model):
    images, size = images_for(model), model.patch_embed.img_size
    _, kept = model(images, return_kept=True)
    pixels = torch.full(images.shape, GRAY, dtype=torch.uint8)
    picture = np.asarray(draw_kept(model, images, pixels))
    rows, columns = model.patch_embed.grid_size
    for i in range(3):
        assert (cell(picture, size, i, 0) == GRAY).all()
        for column, ids in enumerate(kept, 1):
            survives = np.isin(np.arange(rows * columns), ids[i]).reshape(rows, columns)
            shown = cell(picture, size, i, column)[:, :, 0]
            zoom = len(shown) // rows
            there = survives.repeat(zoom, 0).repeat(zoom, 1)
            assert (shown[there] == GRAY).all() and (shown[~there] != GRAY).all()


@pytest.mark.parametrize("shade", [0, 100, 160, 255])
def test_a_faded_patch_is_seen_on_any_background(shade):
    pixels = torch.full((1, 3, 32, 32), float(shade))
    shown = pictures.draw_tokens(torch.tensor([[[0, -1]]]), pixels)[0, 0]
    assert (shown[:, :16] == shade).all() and shown[:, 16:].std() > 20
    dark, light = shown[:SQUARE, 16 : 16 + 2 * SQUARE].unique().tolist()
    assert light - dark > 50 and light == FADED * shade + (1 - FADED) * 255


@torch.no_grad()
def test_class_and_prediction_stand_above_each_row():
    model = deit(32, keep_rate=0.5).eval()
    images, pixels = images_for(model), torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    names = ["cat", "dog", "cow", "hen", "fox"]
    logits = model(images)
    said = pictures.captions(logits, names, ["dog", "cat", "fox"])
    best, share = names[int(logits[1].argmax())], float(logits[1].softmax(0).max())
    assert said[1] == f"cat: predicted {best}, {share:.0%}"
    assert pictures.captions(logits, names)[1] == said[1].removeprefix("cat: ")
    assert pictures.captions(logits) == []
    plain = np.asarray(draw_kept(model, images, pixels))
    written = np.asarray(draw_kept(model, images, pixels, names, names[:3]))
    strip = FONT + GAP // 2
    assert len(written) == len(plain) + 3 * strip
    for row in range(3):
        bottom = len(written) - (3 - row) * (128 + GAP + strip) + strip
        assert (written[bottom - strip : bottom] == 0).any()
        np.testing.assert_array_equal(
            written[bottom : bottom + 128], cell_row(plain, row, 128), f"row {row}"
        )


def cell_row(picture: np.ndarray, row: int, side: int) -> np.ndarray:
    top = len(picture) - (3 - row) * (side + GAP)
    return picture[top : top + side]


@torch.no_grad()
def test_the_heat_map_shows_the_larger_weight_brighter_and_survivors_gray(model):
    images, size = images_for(model), model.patch_embed.img_size
    picture = np.asarray(draw_kept(model, images, torch.zeros(images.shape, dtype=torch.uint8)))
    _, kept = model(images, return_kept=True)
    left = follow(model, images)[2]
    column = len(kept) + 1
    end = GAP + column * (size[1] * -(-MIN_SIDE // size[1]) + GAP)
    assert (picture.shape[1] > end) == model.fusion
    if model.fusion:
        shown = cell(picture, size, 1, column)
        patch = len(shown) // model.patch_embed.grid_size[0]
        shown = shown[patch // 2 :: patch, patch // 2 :: patch].reshape(-1, 3)
        survives = np.isin(np.arange(len(shown)), kept[-1][1])
        np.testing.assert_array_equal((shown == 225).all(1), survives)
        brightness = shown[~survives].sum(1).astype(float)
        order = left[1].numpy()[~survives].clip(pictures.LOWEST).argsort()
        assert (np.diff(brightness[order]) > -10).all() and np.ptp(brightness) > 20


def published_parts(model: evit.EViT, images: torch.Tensor) -> torch.Tensor:
    """What is left of each patch by the published algorithm, (B, P): its tokens are followed."""
    x = model.patch_embed(images)
    parts = torch.eye(x.shape[1]).expand(len(x), -1, -1)
    parts = torch.nn.functional.pad(parts, (0, 0, 1, 0))  # the class token has none of them
    ids = torch.arange(x.shape[1]).expand(len(x), -1)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    rates = dict(zip(model.drop_loc, model.keep_rate, strict=True))
    for i, block in enumerate(model.blocks):
        attended, attention = published.attend(block.attn, block.norm1(x))
        x = x + block.ls1(attended)
        if i in rates:
            setting = (ids, attention, rates[i], model.fusion)
            parts = published.reorganize(parts, *setting)[0]
            x, ids, _ = published.reorganize(x, *setting)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return parts[:, 1:].sum(1)


@torch.no_grad()
@pytest.mark.parametrize("model", [m for m in MODELS if m[0] not in "Dt"], indirect=True)
def test_the_weights_are_those_of_the_published_algorithm(model):
    images = images_for(model)
    left = follow(model, images)[2]
    torch.testing.assert_close(left, published_parts(model, images))


@torch.no_grad()
def test_of_a_surviving_patch_all_is_left_and_without_fusion_of_others_nothing(model):
    images = images_for(model)
    _, kept = model(images, return_kept=True)
    left = follow(model, images)[2]
    for ids, shares in zip(kept[-1], left, strict=True):
        survives = np.isin(np.arange(len(shares)), ids)
        assert (shares[survives] == 1).all()
        rest = shares[~survives]
        assert (rest < 1).all() and ((rest > 0).all() if model.fusion else (rest == 0).all())


def test_where_every_patch_survives_there_is_no_heat_map():
    model = deit(32, keep_rate=1.0)
    picture = draw_kept(model, images_for(model), torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert picture.width == GAP + 4 * (128 + GAP)


@torch.no_grad()
def test_merged_patches_have_the_mean_colour_of_their_token():
    torch.manual_seed(0)
    model = evit.reduce(deit(64), "tome", keep_rate=0.6).eval()
    images = images_for(model)
    pixels = torch.randint(0, 255, images.shape, dtype=torch.uint8)
    picture = np.asarray(draw_kept(model, images, pixels))
    assert picture.shape[1] == GAP + 4 * (2 * 64 + GAP)  # no heat map: nothing is discarded
    _, source = model(images, return_source=True)
    means = torch.nn.functional.avg_pool2d(pixels.float(), 16).flatten(2)  # (B, 3, patches)
    for i in range(3):
        shown = cell(picture, (64, 64), i, 3)
        for patch in range(16):
            group = source[i] == source[i, patch]
            centre = shown[patch // 4 * 32 + 16, patch % 4 * 32 + 16].astype(float)
            if group.sum() > 1:
                np.testing.assert_allclose(centre, means[i][:, group].mean(1), atol=0.51)
            else:
                y, x = patch // 4 * 16 + 8, patch % 4 * 16 + 8
                np.testing.assert_array_equal(centre, pixels[i, :, y, x])


@torch.no_grad()
def test_of_many_places_four_are_shown_the_last_included():
    model = evit.reduce(deit(64, depth=12), "tome", r=1).eval()
    picture = draw_kept(model, images_for(model), torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    assert picture.width == GAP + 5 * (2 * 64 + GAP)
    assert follow(model, images_for(model))[0][-1] == "after block 12\n4 of 16 tokens"
