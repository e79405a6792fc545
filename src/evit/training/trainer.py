"""Lightning's Trainer: on how many processes, in which precision, and without chatter."""

import ctypes
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from evit.recipe import Recipe
from evit.training.checkpoints import WholeFiles


def build_trainer(
    options: Any, folder: Path, callbacks: list[L.Callback], **more: Any
) -> L.Trainer:
    """Lightning's Trainer with the configuration's options, and more of them.

    With several devices and no launcher it starts this command once for each device, by torchrun,
    and ends the program when they have ended: call it early.

    Raises:
        ValueError: Lightning does not know an option, or cannot serve it here.
    """
    options = OmegaConf.to_container(options, resolve=True)
    if options["precision"] == "auto":
        bf16 = options["accelerator"] != "cpu" and torch.cuda.is_available()
        bf16 = bf16 and torch.cuda.is_bf16_supported(including_emulation=False)
        options["precision"] = "bf16-mixed" if bf16 else "32-true"
    ddp = options.pop("ddp")
    options["accumulate_grad_batches"] = options["accumulate_grad_batches"] or 1
    check_static_graph(ddp, options["accumulate_grad_batches"])
    options |= (started := processes(options["devices"], options["num_nodes"]))
    count = started["devices"]
    several = (len(count) if isinstance(count, list) else count) not in (1, "auto")
    several = several or started["num_nodes"] > 1
    if options["strategy"] == "ddp" or several and options["strategy"] == "auto":
        options["strategy"] = DDPStrategy(**ddp)
    try:
        trainer = L.Trainer(
            **options,
            **more,
            enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=callbacks,
            logger=False,
            enable_model_summary=False,
            plugins=[WholeFiles()],
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error
    launched = torch.distributed.is_torchelastic_launched() or SLURMEnvironment.detect()
    if trainer.world_size > 1 and not launched:
        start_processes(trainer.num_devices, trainer.num_nodes)
    return trainer


def start_processes(count: int, nodes: int) -> NoReturn:
    """Run this command once for each of `count` devices, by torchrun, and end with its status.

    Raises:
        ChildProcessError: a signal has ended one of the processes; torchrun has ended the others.
        ValueError: it is to run on several nodes.
    """
    if nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={nodes} needs a launcher on each node: begin the command with "
            f"torchrun or srun (docs/training.md)"
        )
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.disable(logging.ERROR)  # torchrun's account of which process it ends
    try:
        torchrun.main(["--standalone", f"--nproc-per-node={count}", *sys.argv])
    except SignalException as error:
        print(f"stopped by {error.sigval.name}", file=sys.stderr, flush=True)
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        text = f"process {rank} has ended ({name}), and so have the others"
        raise ChildProcessError(text) from None
    sys.exit()


def processes(devices: Any, num_nodes: Any) -> dict[str, Any]:
    """The Trainer's devices and num_nodes: auto is as many as torchrun or srun has started.

    Raises:
        ValueError: other numbers were given; or SLURM's tasks were not started.
    """
    env = os.environ
    if torch.distributed.is_torchelastic_launched():
        launcher, local = "torchrun", int(env["LOCAL_WORLD_SIZE"])
        nodes = int(env["WORLD_SIZE"]) // local
    elif SLURMEnvironment.detect():
        tasks, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", 1))
        launcher, local = "srun", tasks // nodes
        if tasks > 1 and "SLURM_STEP_ID" not in env:
            raise ValueError(
                f"SLURM has {tasks} tasks for this job and runs one: begin the command with srun"
            )
    else:
        return dict(devices=devices, num_nodes=1 if num_nodes == "auto" else num_nodes)
    wanted = len(devices) if isinstance(devices, list) else devices
    for name, value, started in (("devices", wanted, local), ("num_nodes", num_nodes, nodes)):
        if str(value) not in ("auto", "-1", str(started)):
            what = "processes on each node" if name == "devices" else "nodes"
            raise ValueError(
                f"trainer.{name} is {value}, but {launcher} has started {started} {what}: "
                f"leave it at auto"
            )
    return dict(devices=devices if isinstance(devices, list) else local, num_nodes=nodes)


class Signals(L.Callback):
    """Keeps the program's own handler of SIGTERM, and ends this process with its torchrun.

    Lightning's handler waits for all processes of a run, which may be waiting for this one.
    """

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)
        if torch.distributed.is_torchelastic_launched() and sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def on_train_start(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self.handler)

    def on_validation_start(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self.handler)


def check_static_graph(ddp: Any, accumulated: int) -> None:
    if ddp.get("static_graph") and accumulated != 1:
        raise ValueError(
            "trainer.ddp.static_graph=true does not go with trainer.accumulate_grad_batches above "
            "1, or with recipe.max_batch_per_process where that is what it comes to, in PyTorch: "
            "leave it false"
        )


def accumulate(trainer: L.Trainer, options: Any, recipe: Recipe) -> None:
    """Let the trainer accumulate what the recipe does not put on one process at once."""
    if options.accumulate_grad_batches is None:
        trainer.accumulate_grad_batches = recipe.accumulation(trainer.world_size)
        check_static_graph(options.ddp, trainer.accumulate_grad_batches)


def say(text: str) -> None:
    """Print a line, once for all processes."""
    rank_zero_only(print)(text, flush=True)


def quiet() -> None:
    """Leave the terminal to the run: no advertisements, no advice about settings chosen here."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*treespec, LeafSpec.*",
        ".*exists and is not empty.*",
        ".*logging interval.*",
        ".*srun.*available.*not used.*",  # a machine of a cluster may train by itself
        ".*sync_dist=True.*",  # what is logged is of all processes already, or of the first
    ):
        warnings.filterwarnings("ignore", message=message)
