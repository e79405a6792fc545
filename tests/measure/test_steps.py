"""What is timed: a forward pass, a step of training."""

import pytest
import timm
import torch

from evit.measure import steps


def model(**kwargs) -> torch.nn.Module:
    return timm.create_model("evit_deit_tiny_patch16", img_size=32, depth=4, **kwargs)


def test_a_forward_pass_is_without_gradients():
    images, seen = torch.randn(1, 3, 32, 32), []
    evit = model().eval()
    evit.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    steps.inference_step(evit, images)()
    assert seen == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_changes_every_weight(dtype):
    evit = model(drop_loc=[1]).train()
    before = {name: weight.clone() for name, weight in evit.named_parameters()}
    steps.TrainingStep(evit, evit, torch.randn(2, 3, 32, 32), dtype)()
    same = [name for name, weight in evit.named_parameters() if torch.equal(weight, before[name])]
    assert same == []


def test_a_training_step_computes_about_three_times_a_forward_pass():
    evit, images = model(), torch.randn(2, 3, 32, 32)
    forward = steps.executed_macs(steps.inference_step(evit.eval(), images))
    training = steps.executed_macs(steps.TrainingStep(evit.train(), evit, images, torch.float32))
    assert 2.5 < training / forward < 3.5


def test_float32_products_are_restored():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with steps.float32_products("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
