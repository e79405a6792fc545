"""Export a model as a file that runs without this code, checked against PyTorch."""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from evit.commands import checkpoint
from evit.report.evaluations import rate

SUFFIXES = dict(onnx=".onnx", torch_export=".pt2")
OPSET = 20
BATCHES = (1, 2, 5)  # that the file is checked with; it was made with another
TOLERANCE = 1e-4
Compute = Callable[[Tensor], np.ndarray]


def run(cfg: DictConfig) -> Path:
    """Export by a composed configuration; the file, which is there only if it computes the same.

    Raises:
        ValueError: the configuration cannot be served; nothing has been written.
        RuntimeError: the file computes something else.
    """
    require(cfg)
    source = checkpoint.open_source(cfg.checkpoint)
    model, about = checkpoint.weighted(checkpoint.complete(cfg, source), source)
    if not getattr(getattr(model, "reducer", None), "static", True):
        raise ValueError(
            f"reducer {about['reducer']} keeps as many tokens as an image needs, which cannot be "
            f"exported: take another reducer"
        )
    rates, named = rate(about), checkpoint.file_name(about)
    target = Path(cfg.target or Path("outputs/export") / (named + SUFFIXES[cfg.format]))
    if target.suffix != SUFFIXES[cfg.format]:
        raise ValueError(f"target={target}: a {cfg.format} file ends in {SUFFIXES[cfg.format]}")
    kept = " with random weights" if cfg.random else ""
    kept += f", reducer {about['reducer']}" * bool(about["reducer"]) + f" at keep rate {rates}"
    if about["fusion"] is not None:
        kept += ", the rest " + ("fused" if about["fusion"] else "dropped")
    print(f"Exporting {about['model']}{kept}, {about['img_size']} px", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    unchecked = target.with_name(f"unchecked-{target.name}")
    try:
        write, read = dict(onnx=(write_onnx, read_onnx), torch_export=(write_pt2, read_pt2))[
            cfg.format
        ]
        write(model, about, unchecked)
        difference = largest_difference(model, read(unchecked), about["img_size"], cfg.seed)
        unchecked.replace(target)
    finally:
        unchecked.unlink(missing_ok=True)
    print(
        f"{target} ({target.stat().st_size / 1e6:.1f} MB): images float32 (batch, 3, "
        f"{about['img_size']}, {about['img_size']}), normalised by mean {about['mean']} and std "
        f"{about['std']}, to logits (batch, {about['num_classes']})\n"
        f"Checked beside PyTorch at batch sizes {', '.join(map(str, BATCHES))}: the largest "
        f"difference is {difference:.1e}"
    )
    return target


def require(cfg: DictConfig) -> None:
    """Refuse what cannot be exported, before anything is built."""
    if cfg.format not in SUFFIXES:
        raise ValueError(f"format must be {' or '.join(SUFFIXES)}, got {cfg.format!r}")
    checkpoint.require_weights(cfg)
    packages = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if cfg.format == "onnx" and missing:
        raise ValueError(
            f"format=onnx needs {' and '.join(missing)}: pip install 'evit-lab[export]', or take "
            f"format=torch_export"
        )


def example(about: dict[str, Any]) -> dict[str, Any]:
    """What exporters ask for: some images, of which there may be any number."""
    images = torch.zeros(3, 3, about["img_size"], about["img_size"])
    return dict(args=(images,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}})


def write_pt2(model: nn.Module, about: dict[str, Any], path: Path) -> None:
    program = torch.export.export(model, **example(about))
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})


def read_pt2(path: Path) -> Compute:
    module = torch.export.load(path).module()
    return lambda images: module(images).numpy()


def write_onnx(model: nn.Module, about: dict[str, Any], path: Path) -> None:
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # they tell what they rewrite
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own insides
        program = torch.onnx.export(
            model,
            **example(about),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update({k: json.dumps(v) for k, v in about.items()})
    program.save(path)


def read_onnx(path: Path) -> Compute:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images.numpy()})[0]


@torch.no_grad()
def largest_difference(model: nn.Module, compute: Compute, img_size: int, seed: int) -> float:
    """The largest difference of logits, over batches of BATCHES sizes.

    Raises:
        RuntimeError: it is above TOLERANCE.
    """
    generator, found = torch.Generator().manual_seed(seed), 0.0
    for size in BATCHES:
        images = torch.randn(size, 3, img_size, img_size, generator=generator)
        difference = np.abs(compute(images) - model(images).numpy()).max()
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"at batch size {size} the exported logits differ by {difference:.1e}; if two "
                f"tokens score the same to rounding that can be, and another seed= has other images"
            )
        found = max(found, float(difference))
    return found
