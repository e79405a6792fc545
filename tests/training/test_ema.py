"""The moving average of the weights: what is evaluated, and what checkpoints hold."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from evit.training.callbacks import EMA


class Slope(L.LightningModule):
    """One weight, which falls by 1 at every step."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.evaluated: list[float] = []

    def training_step(self, batch, _):
        return self.layer(batch).sum()

    def validation_step(self, *_):
        self.evaluated.append(self.layer.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Saves(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.current_epoch}.ckpt")


def fit(folder, evaluated: bool, epochs: int, checkpoint=None) -> Slope:
    module = Slope()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[EMA(0.5, evaluated), Saves()],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
    )
    batches = DataLoader([torch.ones(1, 1)] * 3, batch_size=None)
    trainer.fit(module, batches, batches, ckpt_path=checkpoint, weights_only=True)
    return module


# The weights after each step are -1, -2, -3; their average at 0.5 is -1, -1.5, -2.25.
@pytest.mark.parametrize(("evaluated", "expected"), [(True, -2.25), (False, -3.0)])
def test_what_is_evaluated_is_what_checkpoints_hold_and_what_is_left(evaluated, expected, tmp_path):
    module = fit(tmp_path, evaluated, epochs=1)
    assert module.evaluated == [expected]
    assert module.layer.weight.item() == expected
    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)
    assert saved["state_dict"]["layer.weight"].item() == expected
    assert evaluated or saved["ema_state_dict"]["layer.weight"].item() == -2.25


@pytest.mark.parametrize("evaluated", [True, False])
def test_weights_and_average_go_on_from_a_checkpoint(evaluated, tmp_path):
    whole = fit(tmp_path, evaluated, epochs=2)
    expected = torch.load(tmp_path / "1.ckpt", weights_only=True)
    resumed = fit(tmp_path, evaluated, epochs=2, checkpoint=tmp_path / "0.ckpt")
    assert resumed.evaluated == whole.evaluated[1:]
    found = torch.load(tmp_path / "1.ckpt", weights_only=True)
    other = "current_model_state" if evaluated else "ema_state_dict"
    assert found["state_dict"] == expected["state_dict"] and found[other] == expected[other]
