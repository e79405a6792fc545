"""Training with Lightning; here, its Trainer: processes, precision, signals, quiet output."""

import ctypes
import logging
import os
import signal
import sys
import warnings
from functools import partial
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

REPLACED = {  # arguments of lightning.Trainer, by what to set instead
    "recipe.epochs": "max_epochs min_epochs max_steps min_steps max_time fast_dev_run",
    "recipe.max_train_images": "limit_train_batches overfit_batches",
    "recipe.max_val_images": "limit_val_batches",
    "recipe.eval_every": "val_check_interval check_val_every_n_epoch",
    "recipe.clip_grad": "gradient_clip_val",
    "logger=NAME": "logger",
    "name=NAME": "default_root_dir enable_checkpointing",
    "nothing": "callbacks plugins barebones reload_dataloaders_every_n_epochs",
}


def build_trainer(options: Any, bf16: str = "bf16-mixed", **more: Any) -> L.Trainer:
    """Build Lightning's Trainer; for several devices, run the command under torchrun and exit."""
    for logger in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(logger).setLevel(logging.WARNING)  # without advertisements
    for advice in ("LeafSpec", "exists and is not empty", "logging interval", "srun", "sync_dist"):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")
    options = OmegaConf.to_container(options, resolve=True)
    for way, names in REPLACED.items():
        for name in set(names.split()) & options.keys():
            raise ValueError(f"trainer.{name} is not taken here: set {way}")
    if options["precision"] == "auto":
        has = options["accelerator"] != "cpu" and torch.cuda.is_bf16_supported(False)
        options["precision"] = bf16 if has else "32-true"
    options["accumulate_grad_batches"] = options["accumulate_grad_batches"] or 1
    options |= processes(options["devices"], options["num_nodes"])
    bar = [RichProgressBar(10)] if sys.stdout.isatty() else []
    more["callbacks"] = [*more.get("callbacks", []), *bar, Signals()]
    more |= dict(enable_progress_bar=bool(bar), num_sanity_val_steps=0, logger=False)
    more |= dict.fromkeys(("enable_model_summary", "use_distributed_sampler"), False)
    try:
        trainer = L.Trainer(**options, **more)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error
    launched = torch.distributed.is_torchelastic_launched() or SLURMEnvironment.detect()
    if trainer.world_size > 1 and not launched:
        start_processes(trainer.num_devices, trainer.num_nodes)
    return trainer


def start_processes(count: int, nodes: int) -> NoReturn:
    """Run this command under torchrun with `count` processes; exit with its status."""
    if nodes > 1:
        raise ValueError(f"trainer.num_nodes={nodes}: begin the command with torchrun or srun")
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException, errors

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.disable(logging.ERROR)  # torchrun logs every process that it ends
    try:
        torchrun.main(["--standalone", f"--nproc-per-node={count}", *sys.argv])
    except SignalException as error:
        print(f"stopped by {error.sigval.name}", file=sys.stderr, flush=True)
        sys.exit(128 + error.sigval)
    except errors.ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # the process has printed the reason
            sys.exit(failure.exitcode)
        how = signal.Signals(-failure.exitcode).name
        text = f"process {rank} has ended ({how}), and so have the others"
        raise ChildProcessError(text) from None
    sys.exit()


def processes(devices: Any, num_nodes: Any) -> dict[str, Any]:
    """Choose devices and num_nodes of the Trainer; auto: as torchrun or srun has started."""
    env = os.environ
    if torch.distributed.is_torchelastic_launched():
        tasks, local = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
    elif SLURMEnvironment.detect():
        tasks = int(env["SLURM_NTASKS"])
        local = tasks // int(env.get("SLURM_NNODES", 1))
        if tasks > 1 and "SLURM_STEP_ID" not in env:
            raise ValueError(f"SLURM has {tasks} tasks for this job: begin the command with srun")
    else:
        return dict(devices=devices, num_nodes=1 if num_nodes == "auto" else num_nodes)
    found = dict(devices=local, num_nodes=tasks // local)
    if devices not in ("auto", -1, local) or num_nodes not in ("auto", found["num_nodes"]):
        started = f"but {local} processes on each of {tasks // local} nodes were started"
        raise ValueError(f"trainer.devices={devices} trainer.num_nodes={num_nodes}, {started}")
    return found


class Signals(L.Callback):
    """Keep our handler of SIGTERM (Lightning's waits for all processes); end with our torchrun."""

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)
        if torch.distributed.is_torchelastic_launched() and sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def on_train_start(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self.handler)

    on_validation_start = on_train_start  # type: ignore[assignment]


say = rank_zero_only(partial(print, flush=True))  # once for all processes
