"""What a batch is charged."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import evit
from evit.config import Recipe
from evit.training.losses import dense_teacher, make_objective
from evit.training.module import Classifier, make_optimizer

RECIPE = Recipe(epochs=10, batch_size=4, lr=1e-3, warmup_lr=0.0)


def DynamicLVViT(**kwargs):
    return evit.LVViT(reducer="dynamicvit", **kwargs)


def forward_masked(model, images):
    """Normalised tokens, none removed, and the decisions."""
    x, decisions = model.reducer.masked_features(model, model.embed(images))
    return model.norm(x), decisions


def tiny(kind=evit.DynamicViT, **kwargs):
    torch.manual_seed(0)
    common = dict(img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=5, keep_rate=0.7)
    return kind(**common | kwargs)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])


def timms(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", **kwargs | dict(keep_rate=None))


@pytest.mark.parametrize("kind", [evit.EViT, timms], ids=["evit", "timm"])
def test_an_ordinary_model_is_charged_the_cross_entropy(kind):
    model, (images, labels) = tiny(kind).eval(), batch()
    losses = make_objective(model, RECIPE, 5, 4)(images, labels)
    assert losses == {"loss": F.cross_entropy(model(images), labels)}


def test_the_ratio_loss_is_the_distance_of_each_image_from_the_shares_to_keep():
    model, (images, labels) = tiny().train(), batch()
    torch.manual_seed(1)
    losses = make_objective(model, RECIPE, 5, 4)(images, labels)
    torch.manual_seed(1)
    x, decisions = forward_masked(model, images)
    distances = [
        (decision.mean(1) - 0.7**s).square().mean() for s, decision in enumerate(decisions, 1)
    ]
    ratio_loss = sum(distances) / 3
    torch.testing.assert_close(losses["ratio_loss"], ratio_loss)
    class_loss = F.cross_entropy(model.forward_head(x), labels)
    torch.testing.assert_close(losses["loss"], class_loss + 2.0 * ratio_loss)


@pytest.mark.parametrize("kind", [evit.DynamicViT, DynamicLVViT])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(kind):
    model = tiny(kind).train()
    teacher = dense_teacher(model)
    for predictor in model.reducer.predictors:  # so sure that every token is kept
        torch.nn.init.zeros_(predictor.out_conv[-2].weight)
        predictor.out_conv[-2].bias.data = torch.tensor([1e4, 0.0])
    if kind is DynamicLVViT:  # whose batch norms would see another batch
        model.patch_embed.eval()
    losses = make_objective(model, RECIPE, 5, 4, teacher=teacher)(*batch())
    assert losses["class_distillation"].abs() < 1e-6
    assert losses["token_distillation"].abs() < 1e-6


def test_distillation_of_tokens_leaves_out_the_dropped_ones():
    model, (images, labels) = tiny().train(), batch()
    teacher = dense_teacher(tiny())
    torch.nn.init.normal_(teacher.norm.weight)
    torch.manual_seed(1)
    losses = make_objective(model, RECIPE, 5, 4, teacher=teacher)(images, labels)
    torch.manual_seed(1)
    x, (*_, kept) = forward_masked(model, images)
    with torch.no_grad():
        distance = (x - teacher.forward_features(images))[:, 1:].square().mean(-1)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(losses["token_distillation"], distance[kept > 0].mean())


def test_the_teacher_s_logits_pull_the_student_s():
    model, (images, labels) = tiny().train(), batch()
    teacher = dense_teacher(tiny(num_classes=5))
    torch.nn.init.normal_(teacher.head.weight)
    objective = make_objective(model, RECIPE, 5, 4, teacher=teacher)
    torch.manual_seed(1)
    losses = objective(images, labels)
    torch.manual_seed(1)
    x, decisions = forward_masked(model, images)
    with torch.no_grad():
        expected = F.kl_div(
            model.forward_head(x).log_softmax(-1),
            teacher(images).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
    torch.testing.assert_close(losses["class_distillation"], expected)
    parts = losses["class_distillation"] + losses["token_distillation"]
    class_loss = F.cross_entropy(model.forward_head(x), labels)
    total = class_loss + 2.0 * losses["ratio_loss"] + 0.5 * parts
    torch.testing.assert_close(losses["loss"], total)


def test_the_teacher_is_frozen_dense_and_not_saved_with_the_model():
    model = tiny().train()
    teacher = dense_teacher(model)
    assert teacher.keep_rate == (1.0,) * 3 and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    module = Classifier(model, RECIPE, 5, make_objective(model, RECIPE, 5, 4, teacher=teacher))
    assert {name.split(".")[0] for name in module.state_dict()} == {"model"}


def test_predictors_learn_at_full_speed_the_backbone_later_and_slower():
    model = tiny()
    recipe = Recipe(
        epochs=10, batch_size=4, lr=1e-3, min_lr=1e-6, backbone_lr=0.01, backbone_frozen_epochs=5
    )
    optimizer, scheduler = make_optimizer(model, recipe, 100)
    predictors = {id(p) for p in model.reducer.predictors.parameters()}
    rates = {"predictors": [], "backbone": []}
    for _ in range(100):
        for group in optimizer.param_groups:
            inside = {id(p) in predictors for p in group["params"]}
            assert len(inside) == 1
            rates["predictors" if inside.pop() else "backbone"].append(group["lr"])
        optimizer.step()
        scheduler.step()
    assert rates["predictors"][0] == pytest.approx(1e-3)
    assert not any(rates["backbone"][:100]) and all(rates["backbone"][100:])
    ratios = [b / p for b, p in zip(rates["backbone"], rates["predictors"], strict=True) if b]
    assert ratios == pytest.approx([0.01] * len(ratios))


def test_frozen_parameters_stay_as_they_are_and_out_of_the_optimizer():
    model = tiny()
    recipe = Recipe(epochs=1, batch_size=4, lr=1e-3, frozen=["cls_token", "pos_embed"])
    Classifier(model, recipe, 5, make_objective(model, recipe, 5, 4))
    optimizer, _ = make_optimizer(model, recipe, 10)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    everything = {id(p) for p in model.parameters()}
    assert everything - optimized == {id(model.cls_token), id(model.pos_embed)}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(frozen=["cls_tokn"]), "recipe.frozen: ReducedViT has no 'cls_tokn'"),
        (dict(backbone_lr=0.1), "recipe.backbone_lr .* reducer that learns"),
        (dict(backbone_frozen_epochs=1), "backbone_frozen_epochs .* reducer that learns"),
    ],
)
def test_a_recipe_for_another_kind_of_model_is_refused(knobs, message):
    model, recipe = tiny(evit.EViT), Recipe(epochs=10, batch_size=4, lr=1e-3, **knobs)
    with pytest.raises(ValueError, match=message):
        Classifier(model, recipe, 5, make_objective(model, recipe, 5, 4))


def token_label_batch() -> tuple[torch.Tensor, ...]:
    maps = torch.randn(4, 2, 5, 6, 6)
    maps[:, 1] = torch.rand(4, 5, 6, 6).topk(5, 1).indices.float()
    crops = torch.tensor([[0.1, 0.2, 0.8, 0.9, 0.0]]).repeat(4, 1)
    return *batch(), maps.half(), crops


@pytest.mark.parametrize(
    ("kind", "label_maps", "taught"),
    [
        (evit.EViT, False, False),
        (evit.LVViT, True, False),
        (evit.DynamicViT, False, False),
        (evit.DynamicViT, False, True),
        (DynamicLVViT, False, True),
    ],
)
def test_each_objective_is_one_graph_with_the_same_gradients(kind, label_maps, taught):
    torch.compiler.reset()
    inputs = token_label_batch() if label_maps else batch()
    counter, gradients = CompileCounter(), []
    for compiled in (False, True):
        model = tiny(kind).train()
        teacher = dense_teacher(model) if taught else None
        objective = make_objective(model, RECIPE, 5, 4, label_maps, teacher)
        if compiled:
            objective.losses = torch.compile(objective.losses, fullgraph=True, backend=counter)
        torch.manual_seed(1)
        np.random.seed(1)
        losses = objective(*inputs)
        losses["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert counter.frame_count == 1
    torch.testing.assert_close(*gradients)
