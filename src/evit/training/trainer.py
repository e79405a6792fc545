"""Lightning's Trainer: on how many processes, in which precision, and without chatter."""

import logging
import os
import socket
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from evit.recipe import Recipe
from evit.training import peers
from evit.training.checkpoints import WholeFiles


def build_trainer(
    options: Any, folder: Path, callbacks: list[L.Callback], **more: Any
) -> L.Trainer:
    """Lightning's Trainer with the configuration's options, and more of them.

    Raises:
        ValueError: Lightning does not know an option, or cannot serve it here.
    """
    options = OmegaConf.to_container(options, resolve=True)
    if options["precision"] == "auto":
        bf16 = options["accelerator"] != "cpu" and torch.cuda.is_available()
        bf16 = bf16 and torch.cuda.is_bf16_supported(including_emulation=False)
        options["precision"] = "bf16-mixed" if bf16 else "32-true"
    options |= processes(options["devices"], options["num_nodes"])
    peers.watch_parent()
    subprocess_script._launch_process_observer = peers.watch_children  # type: ignore[assignment]
    # What Lightning's "ddp" and, with several devices, "auto" mean.
    ddp = options.pop("ddp")
    options["accumulate_grad_batches"] = options["accumulate_grad_batches"] or 1
    check_static_graph(ddp, options["accumulate_grad_batches"])
    StrategyRegistry.register("ddp", DDP, override=True, start_method="popen", **ddp)
    more = dict(enable_progress_bar=False) | more
    try:
        return L.Trainer(
            **options,
            **more,
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


class DDP(DDPStrategy):
    """Processes that, where all of them are on one machine, can be reached from it alone.

    PyTorch's would listen on every address of the machine; with nothing to tell who may connect.
    """

    def setup_distributed(self) -> None:
        environment = self.cluster_environment
        known = LightningEnvironment | SLURMEnvironment | TorchElasticEnvironment
        if self.num_nodes > 1 or not isinstance(environment, known) or sys.platform != "linux":
            return super().setup_distributed()
        if torch.distributed.is_initialized():  # by an earlier call of the trainer
            return super().setup_distributed()
        for backend in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
        if isinstance(environment, TorchElasticEnvironment):  # the meeting point is torchrun's
            return super().setup_distributed()
        self.set_world_ranks()
        store = local_store(environment.main_port, self.global_rank, self.world_size, self._timeout)
        device = self.root_device if self.root_device.type != "cpu" else None
        self._process_group_backend = self._get_process_group_backend()
        _init_dist_connection(
            environment,
            self._process_group_backend,
            timeout=self._timeout,
            device_id=device,
            store=store,
        )


def local_store(
    port: int, rank: int, world_size: int, timeout: timedelta | None
) -> torch.distributed.TCPStore:
    """The processes' meeting point, on the loopback address."""
    options: dict[str, Any] = dict(timeout=timeout) if timeout else {}
    if rank == 0:
        options |= dict(master_listen_fd=socket.create_server(("127.0.0.1", port)).detach())
    return torch.distributed.TCPStore(
        "127.0.0.1", port, world_size, is_master=rank == 0, multi_tenant=True, **options
    )


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
        if str(value) not in ("auto", str(started)):
            what = "processes on each node" if name == "devices" else "nodes"
            raise ValueError(
                f"trainer.{name} is {value}, but {launcher} has started {started} {what}: "
                f"leave it at auto"
            )
    return dict(devices=local if devices == "auto" else devices, num_nodes=nodes)


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
