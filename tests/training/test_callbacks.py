"""What happens beside the training loop."""

from types import SimpleNamespace

import torch
from PIL import Image

import evit
from evit.tracking import Tracker
from evit.training import callbacks
from evit.training.callbacks import KeptPatches


class Recorder(Tracker):
    """Keeps the steps of the pictures instead of sending them."""

    def __init__(self):
        self.steps = []

    def log_image(self, key, image, step):
        self.steps.append(step)


def test_the_images_drawn_are_spread_evenly_and_wandb_gets_every_picture(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        callbacks, "draw_kept", lambda *a: drawn.append(a) or Image.new("RGB", (1, 1))
    )
    model = evit.EViT(28, 7, embed_dim=48, depth=4, num_heads=3, num_classes=2)
    module = SimpleNamespace(model=model)
    patches = KeptPatches(tmp_path / "kept.png", num_images=3)
    data = SimpleNamespace(
        local_batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3, classes=["cat", "dog"]
    )
    recorder = Recorder()
    trainer = SimpleNamespace(
        is_global_zero=True,
        datamodule=data,
        num_val_batches=[2],
        loggers=[recorder],
    )
    evaluated, labels = [1, 2, 5], torch.tensor([[1, 0, 0, 1], [1, 1, 1, 0]])
    batches = torch.arange(8).view(2, 4, 1, 1, 1).expand(-1, -1, 3, 28, 28).float()
    for epoch in evaluated:
        trainer.current_epoch, trainer.global_step = epoch - 1, epoch
        for i, batch in enumerate(zip(batches, labels, strict=True)):
            patches.on_validation_batch_end(trainer, module, None, batch, i)
    assert len(drawn) == len(evaluated) and (tmp_path / "kept.png").is_file()
    for _, images, _, names, truths in drawn:
        assert images[:, 0, 0, 0].tolist() == [0, 2, 4]
        assert names == ["cat", "dog"] and truths == ["dog", "cat", "dog"]
    assert recorder.steps == evaluated
