"""result.json: what a finished run leaves, and the table of it."""

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from evit.config import CONF_DIR
from evit.files import whole_file

PACKAGES = "torch torchvision timm lightning hydra-core torchmetrics wandb ffcv".split()


START = "start.json"  # of the run that a run's first weights are from: its outcome


def start(folder: Path, config: dict[str, Any]) -> None:
    """Clear a run's folder of what is not to be resumed, and put the configuration there."""
    for name in ("result.json", "metrics.jsonl", "kept_patches.png", "wandb/run_id", START):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("hpc_ckpt_*"):  # Lightning's under SLURM, which it would go on from
        path.unlink()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(config, folder / "config.json")
    first = config.get("checkpoint")
    if first and (run := run_folder(first)) and (source := outcome(run)):
        write_json(source, folder / START)


def outcome(folder: Path) -> dict[str, Any] | None:
    """What a run's result has that another of the same run has not, if one has finished there."""
    result = finished(folder)
    return result and {name: result.get(name) for name in ("top1", "top5", "loss")}


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder in which a run of another configuration has left something.

    Raises:
        ValueError: says how to replace it, and how to keep it.
    """
    path = folder / "config.json"
    if path.is_file() and json.loads(path.read_text()) != config:
        raise ValueError(
            f"{folder} holds a run of another configuration (config.json): overwrite=true replaces "
            f"it, name=NAME puts this run elsewhere"
        )


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of the run that has finished in this folder, if one has."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def run_folder(checkpoint: str | Path) -> Path | None:
    """The folder of the run whose checkpoint this may be; None where it cannot be a run's."""
    folder = Path(checkpoint).absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def run_config(checkpoint: str | Path) -> dict[str, Any]:
    """The configuration of the run whose checkpoint this is; {} where it is not a run's.

    The run may be a stranger's, and what is in it is given to Hydra.

    Raises:
        ValueError: it is there and cannot be read, or asks for what no configuration of ours does.
    """
    folder = run_folder(checkpoint)
    if not folder or not (path := folder / "config.json").is_file():
        return {}
    try:
        config = json.loads(path.read_text(), object_pairs_hook=_harmless)
        return config | config["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run ({error})") from error


def _harmless(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, if Hydra calls for it what conf/ names and nothing else, and resolves nothing.

    A prefix would not do: evit.report.results.os.system is os.system. And ${oc.env:NAME} would put
    a secret of the environment into the result.
    """
    for key, value in pairs:
        if key == "_target_" and value not in _callable():
            raise ValueError(f"it asks to call {value}, which conf/ does not")
        if key == "checkpoint_path":
            raise ValueError(f"it asks timm to load {value}")
        if "${" in f"{key}{value}":
            raise ValueError(f"{key} is to be looked up: {value}")
    return dict(pairs)


@functools.cache
def _callable() -> set[str]:
    """Every _target_ of conf/."""
    texts = (path.read_text() for path in CONF_DIR.rglob("*.yaml"))
    found = (re.findall(r"^_target_: *(\S+)", text, re.MULTILINE) for text in texts)
    return {"timm.create_model"}.union(*found)


def finish(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add where and with what a result was made, and write result.json."""
    result |= provenance()
    write_json(result, folder / "result.json")
    return result


def provenance() -> dict[str, Any]:
    """The code that makes a result: its commit, and the versions of what it stands on."""
    return dict(
        commit=git_commit(),
        packages={name: package_version(name) for name in PACKAGES},
        python=platform.python_version(),
    )


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all. Not-a-number is a ValueError."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What runs are compared by; throughput is images/s of inference, None where not measured."""
    config, model = result["config"], result["model"]
    rates = model.get("keep_rate") or [1.0]
    return dict(
        top1=result["top1"],
        top5=result["top5"],
        throughput=result.get("throughput"),
        train_images_per_s=result["train_images_per_s"],
        params=model["params"],
        macs=model.get("macs", model["macs_executed"]),
        model=result["choices"]["model"],
        keep_rate=rates[0] if len(set(rates)) == 1 else rates,
        fusion=model.get("fusion", False) and set(rates) != {1.0},
        img_size=config["img_size"],
    )


def show(result: dict[str, Any], folder: Path) -> None:
    """Print a result as a table."""
    row = summary(result)
    fusion = "fused" if row["fusion"] else "dropped"
    table = Table(box=box.ROUNDED, show_header=False, title_justify="left")
    table.title = f"{row['model']} on {result['data']['name']}, {row['img_size']} px"
    table.add_column(style="bold")
    table.add_column()
    table.add_row("top-1", f"{row['top1']:.2f} %")
    table.add_row("top-5", f"{row['top5']:.2f} %")
    table.add_row(
        "keep rate",
        "1 (dense)" if row["keep_rate"] == 1 else f"{row['keep_rate']}, the rest {fusion}",
    )
    table.add_row("MACs", f"{row['macs'] / 1e9:.3f} G per image")
    table.add_row("parameters", f"{row['params'] / 1e6:.2f} M")
    for name, key in dict(training="train_images_per_s", inference="throughput").items():
        speed = f"{row[key]:.0f}" if row[key] else "-"
        table.add_row(name, f"{speed} images/s on {result['device']}")
    table.add_row("time", f"{result['seconds'] / 60:.1f} min")
    console = Console(markup=False)  # [x] is of the name of a folder, and no colour
    console.print(table)
    files = sorted(path.name for path in folder.iterdir())
    console.print(
        f"{os.path.relpath(folder)}/\n  {'  '.join(files)}", highlight=False, soft_wrap=True
    )


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_commit() -> str | None:
    """The commit of this code, with -dirty where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
