"""The moving average of the weights, and whose accuracy a run reports."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA(WeightAveraging):
    """Exponential moving average of the weights, updated at every optimizer step.

    Args:
        evaluated: evaluations, and "state_dict" in checkpoints, are of the average, as LV-ViT's and
            DynamicViT's authors report it. Otherwise they are of the trained weights, as DeiT's and
            EViT's do, and checkpoints have the average under "ema_state_dict".
    """

    def __init__(self, decay: float, evaluated: bool = True):
        # All weights at once, which Lightning's own EMAWeightAveraging does one by one.
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.evaluated = evaluated
        if not evaluated:
            for name in ("validation_epoch_start", "validation_epoch_end", "train_end"):
                setattr(self, f"on_{name}", lambda *_: None)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning makes the average before it moves the model to its device.
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Any) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if not self.evaluated and "current_model_state" in checkpoint:
            checkpoint["ema_state_dict"] = checkpoint["state_dict"]
            checkpoint["state_dict"] = checkpoint.pop("current_model_state")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Any) -> None:
        if average := checkpoint.get("ema_state_dict"):
            trained = checkpoint["state_dict"]
            checkpoint = checkpoint | dict(current_model_state=trained, state_dict=average)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
