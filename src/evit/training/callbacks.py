"""What happens beside the training loop."""

from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from evit.data.batch import denormalize
from evit.files import whole_file
from evit.measure import speed
from evit.reducers.schedule import keep_rate_at
from evit.report.pictures import draw_kept
from evit.tracking import Tracker


class KeepRateSchedule(L.Callback):
    """Moves the model's keep rate to its final value during training, at every step.

    Logs keep_rate (keep_rate/1, /2, ... where the reorganizations differ) and tokens_per_image:
    the image tokens that a block's MLP sees, averaged over the blocks. While the keep rate moves,
    an image's tokens are rounded up to multiples of token_multiple.
    """

    def __init__(self, shrink_start_epoch: int, shrink_epochs: int, token_multiple: int = 1):
        self.schedule, self.multiple = (shrink_start_epoch, shrink_epochs), token_multiple

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.model, reducer = pl_module.model, pl_module.model.reducer
        self.final: tuple[float, ...] = self.model.keep_rate
        if reducer.masked or reducer.own or reducer.given:
            self.schedule = (0, 0)  # as its authors train it

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
        steps = trainer.num_training_batches
        i -= i % trainer.accumulate_grad_batches  # one rate for a whole step
        step = trainer.current_epoch * steps + i
        rates = keep_rate_at(step, steps, self.final, *self.schedule)
        self.model.reducer.multiple = 1 if rates == self.final else self.multiple
        if rates != self.model.keep_rate:
            self.model.set_keep_rate(rates)
        tokens = self.model.tokens_per_block()
        pl_module.log("tokens_per_image", sum(tokens) / len(tokens))
        if len(set(self.final)) == 1:
            pl_module.log("keep_rate", rates[0])
        else:
            pl_module.log_dict({f"keep_rate/{i}": rate for i, rate in enumerate(rates, 1)})

    def on_train_end(self, *_: Any) -> None:
        self.model.reducer.multiple = 1
        if self.final != self.model.keep_rate:
            self.model.set_keep_rate(self.final)


class KeptPatches(L.Callback):
    """Draws which patches of some validation images survive, at each evaluation, as evaluated.

    The images are spread evenly over those of the first process. The file has the last picture.
    """

    def __init__(self, path: Path, num_images: int = 8):
        self.path, self.num_images = path, num_images
        self.images: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, i: int, *_: Any
    ) -> None:
        if not trainer.is_global_zero:
            return
        self.images = self.images if i else []
        batch_size, batches = trainer.datamodule.local_batch_size, trainer.num_val_batches[0]
        step = max(1, batches * batch_size // self.num_images)
        wanted = self.num_images - len(self.images)
        self.images += batch[0][-i * batch_size % step :: step][:wanted].clone()
        if i == batches - 1:  # before an EMA gives its place back
            self.draw(trainer, pl_module.model)

    def draw(self, trainer: Any, model: Any) -> None:
        images, data = torch.stack(self.images), trainer.datamodule
        picture = draw_kept(model, images, denormalize(images, data.mean, data.std))
        with whole_file(self.path) as file:
            picture.save(file, "png")
        for logger in trainer.loggers:
            if isinstance(logger, Tracker):
                logger.log_image("kept_patches", picture, trainer.global_step)


class InferenceSpeed(L.Callback):
    """Images per second of inference, measured for a moment at the end of training.

    Of one process, without reading images, in the batches of src/benchmark.py. `mode` says how: on
    a CPU 8 images in the run's precision; on a GPU 128, in bf16 weights and compiled.
    """

    images_per_s: float | None = None  # and so it stays if it cannot be measured
    mode: str | None = None
    fast: bool | None = None  # null: on a GPU

    @torch.no_grad()
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        device, size = pl_module.device, trainer.datamodule.img_size
        batch_size = 8 if device.type == "cpu" else 128
        images = torch.rand(batch_size, 3, size, size, device=device)
        model, context = pl_module.model.eval(), trainer.precision_plugin.forward_context()
        forward, self.mode = model.forward, str(trainer.precision)
        if device.type == "cuda" if self.fast is None else self.fast:
            print("Compiling the model, to measure its speed", flush=True)
            speed.allow_graphs()
            model, images = deepcopy(model).bfloat16(), images.bfloat16()
            forward, self.mode = torch.compile(model.forward, dynamic=False), "bf16-true, compiled"
            context = nullcontext()
        with context:
            try:
                calls = speed.warm_up(partial(forward, images), 0.2, device)
                seconds = speed.timed(partial(forward, images), calls, device)
                self.images_per_s = calls * batch_size / seconds
            except Exception as error:  # of a compiler, say: training is done and must not fail
                print(f"The speed of inference is not measured: {error}".splitlines()[0])
