"""Export a model as a file that runs without this code, checked against PyTorch."""

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
from evit.files import telling
from evit.report.evaluations import rate

BATCHES = (1, 2, 5)  # to check the file with; it is exported with another
TOLERANCE = 1e-4
Compute = Callable[[Tensor], np.ndarray]


@telling(lambda: "exporting")
def run(cfg: DictConfig) -> Path:
    """Export a model; return the file, which is kept only if its outputs match the model's."""
    if cfg.format not in FORMATS:
        raise ValueError(f"format must be {' or '.join(FORMATS)}, got {cfg.format!r}")
    suffix, write = FORMATS[cfg.format]
    if cfg.target and Path(cfg.target).suffix != suffix:
        raise ValueError(f"target={cfg.target}: a {cfg.format} file ends in {suffix}")
    model, about, cfg, _ = checkpoint.opened(cfg)
    target, size = checkpoint.target_file(cfg, about, "export", suffix), about["img_size"]
    kind = "random weights" if cfg.random else about["reducer"] or "dense"
    print(f"Exporting {about['model']}, {kind}, keep rate {rate(about)}, {size} px", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    unchecked = target.with_name(f"unchecked-{target.name}")
    generator, largest = torch.Generator().manual_seed(cfg.seed), 0.0
    try:
        compute = write(model, about, unchecked)
        for batch in BATCHES:
            images = torch.randn(batch, 3, size, size, generator=generator)
            difference = float(np.abs(compute(images) - model(images).numpy()).max())
            if not difference <= TOLERANCE:  # NaN is not
                raise RuntimeError(
                    f"at batch size {batch} the exported logits differ by {difference:.1e}; where "
                    f"two tokens score alike that can be: another seed= has other images"
                )
            largest = max(largest, difference)
        unchecked.replace(target)
    finally:
        unchecked.unlink(missing_ok=True)
    sizes, norm = ", ".join(map(str, BATCHES)), f"mean {about['mean']}, std {about['std']}"
    print(f"{target}: float32 images (batch, 3, {size}, {size}), normalised by {norm}, to logits")
    print(f"Compared with PyTorch at batch sizes {sizes}: largest difference {largest:.1e}")
    return target


def example(about: dict[str, Any]) -> dict[str, Any]:
    """Example arguments for exporters: images, with a dynamic batch size."""
    images = torch.zeros(3, 3, about["img_size"], about["img_size"])
    return dict(args=(images,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}})


def write_pt2(model: nn.Module, about: dict[str, Any], path: Path) -> Compute:
    """Write a torch.export file; return a function that runs it."""
    program = torch.export.export(model, **example(about))
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    module = torch.export.load(path).module()
    return lambda images: module(images).numpy()


def write_onnx(model: nn.Module, about: dict[str, Any], path: Path) -> Compute:
    """Write an ONNX file; return a function that runs it."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        way = "pip install 'evit-lab[export]', or take format=torch_export"
        raise ValueError(f"format=onnx needs {error.name}: {way}") from error
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # they tell what they rewrite
        logging.getLogger(name).setLevel(logging.ERROR)
    names: Any = dict(input_names=["images"], output_names=["logits"])
    with warnings.catch_warnings(action="ignore"):  # from inside the exporter
        program: Any = torch.onnx.export(
            model, **example(about), **names, dynamo=True, opset_version=20, verbose=False
        )
    program.model.metadata_props.update({k: json.dumps(v) for k, v in about.items()})
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images.numpy()})[0]


FORMATS = dict(onnx=(".onnx", write_onnx), torch_export=(".pt2", write_pt2))
