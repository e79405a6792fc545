"""Images per second of inference, as a run's result has them."""

from types import SimpleNamespace

import torch

import evit
from evit.commands.train import throughput


def measured(monkeypatch, broken=False, **options):
    """What is measured of a tiny model, and the types of what was compiled."""
    seen = []

    def compiled(function, **_):
        seen.append(next(function.__self__.parameters()).dtype)
        return None if broken else function

    monkeypatch.setattr(torch, "compile", compiled)
    model = evit.EViT(img_size=28, patch_size=7, embed_dim=12, depth=4, num_heads=3)
    trainer = SimpleNamespace(precision="32-true")
    trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer.precision_plugin = SimpleNamespace(forward_context=torch.no_grad)
    found = throughput(trainer, model, 28, **options)
    assert next(model.parameters()).dtype == torch.float32
    return found, seen


def test_it_is_measured_as_is_best_on_the_device(monkeypatch):
    found, seen = measured(monkeypatch)
    assert found["throughput"] > 0 and (found["throughput_mode"], seen) == ("32-true", [])
    found, seen = measured(monkeypatch, fast=True)  # as on a GPU
    assert found["throughput"] > 0
    assert (found["throughput_mode"], seen) == ("bf16-true, compiled", [torch.bfloat16])


def test_a_speed_that_cannot_be_measured_does_not_end_a_run(monkeypatch, capsys):
    found, _ = measured(monkeypatch, broken=True, fast=True)
    assert found["throughput"] is None
    assert "The speed of inference is not measured" in capsys.readouterr().out
