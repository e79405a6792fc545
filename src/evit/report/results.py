"""result.json: the result of a finished run, and its table for the terminal."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from rich import box
from rich.console import Console
from rich.table import Table

from evit.config import CONF_DIR
from evit.files import whole_file

PACKAGES = "torch torchvision timm lightning hydra-core torchmetrics wandb ffcv".split()


START = "start.json"  # the outcome of the run that a run's first weights come from


def start(folder: Path, config: dict[str, Any]) -> None:
    """Clear a run's folder of an older run's files, and write the configuration there."""
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
    """The metrics that identify a run's outcome, or None if no run has finished there."""
    result = finished(folder)
    return result and {name: result.get(name) for name in ("top1", "top5", "loss")}


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Refuse, with a ValueError, a folder that holds a run of another configuration."""
    path = folder / "config.json"
    if path.is_file() and json.loads(path.read_text()) != config:
        raise ValueError(
            f"{folder} holds a run of another configuration (config.json): overwrite=true replaces "
            f"it, name=NAME puts this run elsewhere"
        )


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of the run that has finished in this folder, or None."""
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def run_folder(checkpoint: str | Path) -> Path | None:
    """The folder of the run that a checkpoint's path belongs to; None if it is not a run's."""
    folder = Path(checkpoint).absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def run_config(checkpoint: str | Path) -> dict[str, Any]:
    """The configuration of the run that a checkpoint belongs to; {} if it is not a run's.

    The file may come from a stranger, and Hydra will instantiate what it names.

    Raises:
        ValueError: the file cannot be read, or names a target that conf/ does not.
    """
    folder = run_folder(checkpoint)
    if not folder or not (path := folder / "config.json").is_file():
        return {}
    try:
        config = harmless(path.read_text())
        return config | config["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run ({error})") from error


def harmless(text: str) -> Any:
    """Read a configuration from JSON whose targets are all in conf/, and with nothing to resolve.

    A check of a target's prefix would not do: evit.report.results.os.system is os.system. And
    ${oc.env:NAME} would put a secret of the environment into the result.

    Raises:
        ValueError: it asks for what no configuration of ours does.
    """
    known = _callable()

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            if key == "_target_" and value not in known:
                raise ValueError(
                    f"it asks to call {value}, which conf/ does not: for a reducer of your own "
                    f"give the folder of its YAML, --config-dir DIR"
                )
            if key == "checkpoint_path":
                raise ValueError(f"it asks timm to load {value}")
            if "${" in f"{key}{value}":
                raise ValueError(f"{key} is to be looked up: {value}")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=checked)


def _callable() -> set[str]:
    """Every _target_ of conf/, and of the folders that the user has given to Hydra."""
    folders = {CONF_DIR}
    if HydraConfig.initialized():
        sources = HydraConfig.get().runtime.config_sources
        folders |= {Path(source.path) for source in sources if source.schema == "file"}
    texts = (path.read_text() for folder in folders for path in folder.rglob("*.yaml"))
    found = (re.findall(r"^_target_: *(\S+)", text, re.MULTILINE) for text in texts)
    return {"timm.create_model"}.union(*found)


def finish(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add the provenance to a result, and write result.json."""
    result |= provenance()
    write_json(result, folder / "result.json")
    return result


def provenance() -> dict[str, Any]:
    """The commit of this code, and the versions of its dependencies."""
    return dict(
        commit=git_commit(),
        packages={d.name.lower(): d.version for d in distributions() if d.name.lower() in PACKAGES},
        python=platform.python_version(),
    )


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file whole or not at all; a number that is not finite is a ValueError."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers that runs are compared by.

    throughput is images/s of inference; None: not measured.
    """
    config, model = result["config"], result["model"]
    name = result["choices"]["model"]
    if name.startswith("timm_"):  # one file of conf/model for all of timm's models
        name = config["model"].get("model_name", name)
    rate = one_rate(model.get("keep_rate") or 1.0)
    return dict(
        top1=result["top1"],
        top5=result["top5"],
        throughput=result.get("throughput"),
        train_images_per_s=result["train_images_per_s"],
        params=model["params"],
        macs=model.get("macs", model["macs_executed"]),
        model=name,
        reducer="none" if rate == 1 else reducer_name(model.get("reducer"), name),
        keep_rate=rate,
        fusion=model.get("fusion", False) and rate != 1,
        img_size=config["img_size"],
    )


def show(result: dict[str, Any], folder: Path) -> None:
    """Print a result as a table."""
    row, device = summary(result), result["device"]
    rate = str(row["keep_rate"])
    if row["reducer"] == "evit":
        rate += ", the rest " + ("fused" if row["fusion"] else "dropped")
    lines = {
        "top-1": f"{row['top1']:.2f} %",
        "top-5": f"{row['top5']:.2f} %",
        "keep rate": "1 (dense)" if row["reducer"] == "none" else rate,
        "reducer": row["reducer"],
        "epochs": str(result["config"]["recipe"]["epochs"]),
        "MACs": f"{row['macs'] / 1e9:.3f} G per image",
        "parameters": f"{row['params'] / 1e6:.2f} M",
    }
    for name, key in dict(training="train_images_per_s", inference="throughput").items():
        lines[name] = f"{row[key]:.0f} images/s on {device}" if row[key] else "not measured"
    lines["time"] = f"{result['seconds'] / 60:.1f} min"
    table = Table(box=box.ROUNDED, show_header=False, title_justify="left")
    table.title = f"{row['model']} on {result['data']['name']}, {row['img_size']} px"
    for line in lines.items():
        table.add_row(*line)
    console = Console(markup=False)  # [x] is part of a folder's name, not a colour
    console.print(table)
    files = "  ".join(sorted(path.name for path in folder.iterdir()))
    console.print(f"{os.path.relpath(folder)}/\n  {files}", highlight=False, soft_wrap=True)


def one_rate(rates: Any) -> Any:
    """One number where all locations have the same keep rate."""
    return rates[0] if isinstance(rates, list) and len(set(rates)) == 1 else rates


def reducer_name(name: str | None, model: str) -> str:
    """The reducer's name; results from before reducers had names are EViT's or DynamicViT's."""
    return name or ("dynamicvit" if "dynamicvit" in model else "evit")


def trained_keep_rate(run: dict[str, Any]) -> Any:
    """The keep rate, or rates, that a run was trained at; None: not known."""
    if "reducer" in run.get("model", {}):
        return (run["model"]["reducer"] or dict(keep_rate=1.0)).get("keep_rate")
    return run["model"].get("keep_rate", run.get("keep_rate")) if "model" in run else None


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


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
