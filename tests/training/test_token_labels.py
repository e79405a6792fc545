"""LV-ViT's token labelling, with and without dropped tokens."""

import numpy as np
import pytest
import torch

import evit
from evit.config import Recipe
from evit.data.label_maps import token_targets
from evit.training import losses as objectives
from evit.training.losses import make_objective, mix_token_box, soft_cross_entropy

RECIPE = Recipe(epochs=10, batch_size=4, lr=1e-3, label_smoothing=0.1)


def tiny(**kwargs) -> evit.LVViT:
    torch.manual_seed(0)
    common = dict(img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=7, keep_rate=1.0)
    return evit.LVViT(**common | kwargs)


def batch() -> tuple[torch.Tensor, ...]:
    maps = torch.randn(4, 2, 5, 6, 6)
    maps[:, 1] = torch.rand(4, 7, 6, 6).topk(5, 1).indices.float()
    crops = torch.tensor([[0.1, 0.2, 0.8, 0.9, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]]).repeat(2, 1)
    return torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]), maps.half(), crops


@pytest.fixture
def box(monkeypatch) -> torch.Tensor:
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:3, 0:3] = True
    monkeypatch.setattr(objectives, "mix_token_box", lambda grid: inside)
    return inside


def test_unmixing_the_targets_is_the_authors_unmixing_of_the_outputs(box):
    model, (images, labels, maps, crops) = tiny().eval(), batch()
    losses = make_objective(model, RECIPE, 7, 4, label_maps=True)(images, labels, maps, crops)

    patches = model.patch_embed(images).unflatten(1, (4, 4))
    mixed = patches.clone()
    mixed[:, 1:3, 0:3] = patches.flip(0)[:, 1:3, 0:3]
    x = model.norm(model.blocks(model._pos_embed(mixed.flatten(1, 2))))
    outputs = model.aux_head(x[:, 1:]).unflatten(1, (4, 4))
    unmixed = outputs.clone()
    unmixed[:, 1:3, 0:3] = outputs.flip(0)[:, 1:3, 0:3]
    class_targets, targets = token_targets(maps, crops, 7, (4, 4), 0.1)
    token_loss = soft_cross_entropy(unmixed.flatten(1, 2), targets).mean()
    share = 1 - 6 / 16
    mixed_targets = share * class_targets + (1 - share) * class_targets.flip(0)
    class_loss = soft_cross_entropy(model.head(x[:, 0]), mixed_targets).mean()
    torch.testing.assert_close(losses["token_loss"], token_loss)
    torch.testing.assert_close(losses["class_loss"], class_loss)
    torch.testing.assert_close(losses["loss"], class_loss + token_loss)


@pytest.mark.parametrize("fusion", [True, False])
def test_only_surviving_patches_are_charged_each_with_its_own_label(box, fusion):
    model = tiny(keep_rate=0.5, fusion=fusion).eval()
    images, labels, maps, crops = batch()
    losses = make_objective(model, RECIPE, 7, 4, label_maps=True)(images, labels, maps, crops)

    x = model.embed(images, box.flatten())
    ids = model.patch_ids(x)
    x, reductions = model.encode(x)
    for reduction in reductions:
        ids = reduction.ids(ids)
    logits = model.aux_head(model.norm(x)[:, 1:])
    assert (ids[:, -1] == -1).all() == fusion
    _, targets = token_targets(maps, crops, 7, (4, 4), 0.1)
    charged = []
    for b in range(4):
        for token, patch in enumerate(ids[b].tolist()):
            if patch >= 0:
                source = 3 - b if box.flatten()[patch] else b
                charged.append(soft_cross_entropy(logits[b, token], targets[source, patch]))
    assert len(charged) < 4 * 16 / 4
    torch.testing.assert_close(losses["token_loss"], torch.stack(charged).mean())


def test_the_weight_of_the_token_loss_is_the_recipe_s(box):
    model, given = tiny().eval(), batch()
    losses = [
        make_objective(
            model,
            Recipe(epochs=10, batch_size=4, lr=1e-3, token_label_weight=weight),
            *(7, 4),
            label_maps=True,
        )(*given)
        for weight in (0.0, 0.5)
    ]
    torch.testing.assert_close(losses[0]["loss"], losses[0]["class_loss"])
    difference = losses[1]["loss"] - losses[0]["loss"]
    torch.testing.assert_close(difference, 0.5 * losses[1]["token_loss"])


def test_every_parameter_learns_from_token_labels():
    model = tiny(keep_rate=0.5)
    make_objective(model, RECIPE, 7, 4, label_maps=True)(*batch())["loss"].backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_mixed_boxes_are_the_authors_draw_for_draw():
    sizes = set()
    for seed in range(200):
        np.random.seed(seed)
        cut = np.sqrt(1 - np.random.beta(1.0, 1.0))
        spans = []
        for size in (14, 20):
            centre = np.random.randint(size)
            half = int(size * cut) // 2
            spans.append(slice(np.clip(centre - half, 0, size), np.clip(centre + half, 0, size)))
        expected = np.zeros((14, 20), bool)
        expected[tuple(spans)] = True
        np.random.seed(seed)
        assert np.array_equal(mix_token_box((14, 20)).numpy(), expected)
        sizes.add(int(expected.sum()))
    assert 0 in sizes and max(sizes) > 200


def test_mixup_beside_token_labels_is_refused():
    recipe = Recipe(epochs=10, batch_size=4, lr=1e-3, mixup=0.8)
    with pytest.raises(ValueError, match="not mixup and cutmix: take recipe=lvvit"):
        make_objective(tiny(), recipe, 7, 4, label_maps=True)


def test_a_teacher_beside_token_labels_is_for_reducers_that_learn():
    with pytest.raises(ValueError, match="recipe.teacher need data.label_maps=null"):
        make_objective(tiny(), RECIPE, 7, 4, label_maps=True, teacher=tiny())
    learning = tiny(reducer="dynamicvit")
    make_objective(learning, RECIPE, 7, 4, label_maps=True, teacher=tiny())


def test_without_label_maps_it_is_plain_classification():
    model, (images, labels, *_) = tiny().eval(), batch()
    losses = make_objective(model, RECIPE, 7, 4)(images, labels)
    expected = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
    assert losses == {"loss": expected}
