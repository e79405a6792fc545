"""The files that a run leaves, what identifies it, and its result on the terminal."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from datetime import timedelta
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from evit.config import CONF_DIR, counted
from evit.files import whole_file

PACKAGES = "torch torchvision timm lightning hydra-core torchmetrics wandb ffcv".split()
START = "start.json"  # a run's note of the outcome of the run that its first weights are from
# Runs of one setting may differ in these values.
OWN = {"seed", "name", "logger", "checkpoint", "overwrite"}
OWN_DATA = {"seed", "cache_dir", "num_workers", "batches_ahead"}


def start(folder: Path, config: dict[str, Any]) -> None:
    """Remove an older run's files from a run's folder, and write the configuration there."""
    old = f"result.json metrics.jsonl kept_patches.png wandb/run_id {START} hpc_ckpt_*".split()
    for path in (path for name in old for path in folder.glob(name)):
        path.unlink()  # Lightning would go on from hpc_ckpt_*, which it leaves under SLURM
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    write_json(config, folder / "config.json")
    if source := outcome(run_folder(config.get("checkpoint") or "")):
        write_json(source, folder / START)


def read_json(path: Path) -> Any:
    """Read a JSON file; return None if there is none."""
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file whole or not at all; a number that is not finite is a ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def finished(folder: Path, config: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Read a run's result; ValueError: the run is of another configuration than the given one."""
    if config and read_json(folder / "config.json") not in (None, config):
        ways = "overwrite=true replaces it, name=NAME puts this run elsewhere"
        raise ValueError(f"{folder} holds a run of another configuration (config.json): {ways}")
    return read_json(folder / "result.json")


def outcome(folder: Path | None) -> dict[str, Any] | None:
    """Return the metrics that identify a run's outcome; None if no run has finished there."""
    result = folder and finished(folder)
    return {name: result.get(name) for name in ("top1", "top5", "loss")} if result else None


def run_folder(checkpoint: str | Path) -> Path | None:
    """Return the folder of the run that a checkpoint's path belongs to, or None."""
    folder = Path(checkpoint).absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def run_config(checkpoint: str | Path) -> dict[str, Any]:
    """Read the configuration, which must be harmless, of a checkpoint's run; {}: it has none."""
    path = (run_folder(checkpoint) or Path(checkpoint)) / "config.json"
    if not path.is_file():
        return {}
    try:
        config = harmless(path.read_text())
        return config | config["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run ({error})") from error


def harmless(text: str) -> Any:
    """Read a configuration, whose targets Hydra will call, from JSON; ValueError: unsafe.

    Only targets of conf/ may be called: a prefix proves nothing, as evit.report.results.os.system
    is os.system. And ${oc.env:NAME} would copy a secret of the environment into the result."""
    folders, known = {CONF_DIR}, {"timm.create_model"}
    if HydraConfig.initialized():  # and those that the user has given to Hydra
        sources = HydraConfig.get().runtime.config_sources
        folders |= {Path(source.path) for source in sources if source.schema == "file"}
    for path in (path for folder in folders for path in folder.rglob("*.yaml")):
        known.update(re.findall(r"(?m)^_target_: *(\S+)", path.read_text()))

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            if key == "_target_" and value not in known:
                raise ValueError(f"it asks to call {value}, not in conf/ or --config-dir DIR")
            if key == "checkpoint_path":
                raise ValueError(f"it asks timm to load {value}")
            if "${" in f"{key}{value}":
                raise ValueError(f"{key} is to be looked up: {value}")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=checked)


def setting(config: dict[str, Any]) -> str:
    """Hash a run's configuration; runs that differ only in OWN and OWN_DATA hash alike."""
    data = {key: value for key, value in config["data"].items() if key not in OWN_DATA}
    return digest({k: v for k, v in config.items() if k not in OWN} | dict(data=data))


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def started_from(checkpoint: str | Path | None) -> str | None:
    """Identify first weights: by the setting of the run that they are from, else by SHA-256."""
    folder = checkpoint and run_folder(checkpoint)
    config = folder and read_json(folder / "config.json")
    if isinstance(config, dict) and "recipe" in config:  # or it is of another program
        return setting(config)
    return sha256(Path(checkpoint)) if checkpoint else None


def provenance() -> dict[str, Any]:
    packages = {d.name.lower(): d.version for d in distributions() if d.name.lower() in PACKAGES}
    return dict(commit=git_commit(), packages=packages, python=platform.python_version())


def git_commit() -> str | None:
    """Return the commit of this code, with -dirty if files differ; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {counted(torch.get_num_threads(), 'thread')})"


def one_rate(rates: Any) -> Any:
    return rates[0] if isinstance(rates, list) and len(set(rates)) == 1 else rates


def trained_keep_rate(run: dict[str, Any]) -> Any:
    return (run["model"]["reducer"] or dict(keep_rate=1.0)).get("keep_rate") if run else None


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers that runs are compared by; throughput (images/s) may be None."""
    config, model, name = result["config"], result["model"], result["choices"]["model"]
    if name.startswith("timm_"):  # one file of conf/model for all of timm's models
        name = config["model"].get("model_name", name)
    rate = one_rate(model.get("keep_rate") or 1.0)
    numbers = {key: result[key] for key in ("top1", "top5", "train_images_per_s")}
    numbers |= dict(throughput=result.get("throughput"), params=model["params"])
    numbers |= dict(macs=model.get("macs", model["macs_executed"]), model=name)
    numbers |= dict(reducer="none" if rate == 1 else model["reducer"], keep_rate=rate)
    return numbers | dict(fusion=rate != 1 and model["fusion"], img_size=config["img_size"])


def show(result: dict[str, Any], folder: Path) -> None:
    """Print a result and the names of the run's files."""
    row = summary(result)
    speeds = [row["train_images_per_s"], row["throughput"]]
    train, infer = (f"{speed:.0f} images/s" if speed else "not measured" for speed in speeds)
    print(f"""{row["model"]} on {result["data"]["name"]}, {row["img_size"]} px
  top-1       {row["top1"]:.2f} %
  top-5       {row["top5"]:.2f} %
  keep rate   {row["keep_rate"]}
  reducer     {row["reducer"]}{", fused" * row["fusion"]}
  epochs      {result["config"]["recipe"]["epochs"]}
  MACs        {row["macs"] / 1e9:.3f} G per image
  parameters  {row["params"] / 1e6:.2f} M
  training    {train}
  inference   {infer}
  time        {timedelta(seconds=round(result["seconds"]))} on {result["device"]}
{os.path.relpath(folder)}/
  {"  ".join(sorted(path.name for path in folder.iterdir()))}""")
