"""What tests/training/test_ddp.py starts with torchrun: runs of src/train.py that are recorded."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

# Without augmentation of batches, but with a keep rate that moves and weights that are averaged.
COMMON = (
    "trainer=ddp trainer.accelerator=cpu trainer.log_every_n_steps=1 logger=none "
    "data.num_workers=1 recipe.batch_size=4 recipe.epochs=2 recipe.lr=1e-3 recipe.lr_batch_size=4 "
    "recipe.warmup_epochs=0 recipe.cooldown_epochs=0 recipe.mixup=0 recipe.cutmix=0 "
    "recipe.random_erasing=0 recipe.drop_path=0 recipe.shrink_start_epoch=0 recipe.shrink_epochs=1 "
    "recipe.eval_every=1 recipe.max_val_images=5"  # 3 in one process, 2 in the other
).split()
EVIT = [*COMMON, "model=evit_deit_micro", "img_size=28", "recipe.ema_decay=0.9", "name=evit"]
LVVIT = [  # it has BatchNorm; and one process has nothing to evaluate
    *(*COMMON, "model=evit_lvvit", "recipe=lvvit", "img_size=32", "name=lvvit"),
    "recipe.max_val_images=1",
    *("+model.embed_dim=48", "+model.depth=4", "+model.num_heads=3"),
]


def record(arguments: list[str], patch: pytest.MonkeyPatch) -> list[dict]:
    """What each batch of a run of src/train.py was made of, and did, in this process."""
    import train
    from evit.training.module import Classifier

    batches: list[dict] = []
    step = Classifier.training_step
    init = DistributedDataParallel.__init__

    def training_step(self, batch, batch_idx):
        weights = sum(p.detach().double().sum() for p in self.parameters())
        loss = step(self, batch, batch_idx)
        batches.append(
            dict(
                epoch=self.current_epoch,
                images=[float(image.double().sum()) for image in batch[0]],
                weights=float(weights),
                seed=torch.initial_seed(),
                keep_rate=self.model.keep_rate,
                loss=loss.item(),
                reductions=0,
            )
        )
        return loss

    def counting_init(self, *args, **kwargs):
        init(self, *args, **kwargs)

        def hook(group, bucket):
            batches[-1]["reductions"] += 1
            return allreduce_hook(group, bucket)

        self.register_comm_hook(None, hook)

    patch.setattr(Classifier, "training_step", training_step)
    patch.setattr(DistributedDataParallel, "__init__", counting_init)
    patch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()
    return batches


def evaluate(folder: Path, patch: pytest.MonkeyPatch, *more: str) -> None:
    """Run src/evaluate.py on one image, with the model of the run that a folder has."""
    import evaluate

    (path,) = folder.glob("outputs/evit/*/checkpoints/last.ckpt")
    arguments = [f"checkpoint={path}", "max_val_images=1", "keep_rates=[1,0.5]"]
    patch.setattr(sys, "argv", ["evaluate.py", *arguments, *more])
    evaluate.main()


if __name__ == "__main__":
    more, rank = ["trainer.accumulate_grad_batches=2", *sys.argv[1:]], os.environ["RANK"]
    with pytest.MonkeyPatch.context() as patch:
        found = dict(evit=record([*EVIT, *more], patch))
    with pytest.MonkeyPatch.context() as patch:
        evaluate(Path(), patch, "trainer=ddp", "trainer.accelerator=cpu")
    with pytest.MonkeyPatch.context() as patch:
        found["lvvit"] = record([*LVVIT, *sys.argv[1:]], patch)
    Path(f"rank{rank}.json").write_text(json.dumps(found))
