"""Use a trained model: draw which patches it keeps, predict classes, export it."""

import csv
import json
import logging
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from timm.data import ImageNetInfo
from torch import Tensor, nn

from evit.commands import checkpoint
from evit.config import counted, listed
from evit.data.batch import normalize
from evit.data.folders import image_files, in_words, load_image
from evit.data.imagefolder import evaluation_transform
from evit.files import telling
from evit.report import rate
from evit.report.pictures import draw_features, draw_kept

BATCHES = (1, 2, 5)  # to check an exported file with; it is exported with another
TOLERANCE = 1e-4
Compute = Callable[[Tensor], np.ndarray]


@telling(lambda: "drawing")
def visualize(cfg: DictConfig) -> Path:
    """Draw the kept patches, or the final feature maps, of images; return the file."""
    kinds = dict(kept=(draw_kept, ".png"), features=(draw_features, "-features.png"))
    if cfg.show not in kinds:
        raise ValueError(f"show must be kept or features, got {cfg.show!r}")
    if cfg.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {cfg.num_images}")
    (draw, suffix), (model, about, cfg, _) = kinds[cfg.show], checkpoint.opened(cfg)
    if not hasattr(model, "reducer"):
        raise ValueError(f"{type(model).__name__} reduces no tokens: {checkpoint.REDUCED}")
    target, truths = checkpoint.target_file(cfg, about, "pictures", suffix), list[str]()
    if cfg.images is not None:
        pixels = read_pixels(image_paths(cfg.images, cfg.num_images), cfg)
    else:
        data = checkpoint.validation(cfg, cfg.num_images, cfg.num_images, ready=True)
        pixels, labels = next(iter(data.val_dataloader()))
        truths = [in_words(list(data.classes))[label] for label in labels]
    print(f"Drawing {counted(len(pixels), 'image')} at keep rate {rate(about)}", flush=True)
    names = [] if cfg.random else class_names(about)
    images = normalize(pixels, about["mean"], about["std"])
    picture = draw(model, images, pixels, names, truths)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target)
    print(f"{target} ({picture.width} x {picture.height} pixels)")
    return target


@telling(lambda: "predicting")
@torch.no_grad()
def predict(cfg: DictConfig) -> None:
    """Predict the classes of images; print names and probabilities, and write a table."""
    if cfg.top < 1 or cfg.batch_size < 1:
        raise ValueError(f"top={cfg.top} and batch_size={cfg.batch_size} must be at least 1")
    rows: list[Any] = [("image", "rank", "class", "probability")]
    paths = image_paths(cfg.images)
    model, about, cfg, _ = checkpoint.opened(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = class_names(about)
    model.to(device)
    for start in range(0, len(paths), cfg.batch_size):
        some = paths[start : start + cfg.batch_size]
        images = normalize(read_pixels(some, cfg).to(device), about["mean"], about["std"])
        values, labels = model(images).softmax(1).topk(min(cfg.top, len(names)))
        for path, *best in zip(some, values.tolist(), labels.tolist(), strict=True):
            found = [(names[label], value) for value, label in zip(*best, strict=True)]
            print(f"{path}: " + ", ".join(f"{k} {v:.1%}" for k, v in found), flush=True)
            rows += [(str(path), i, k, f"{v:.6f}") for i, (k, v) in enumerate(found, 1)]
    if cfg.target:
        Path(cfg.target).parent.mkdir(parents=True, exist_ok=True)
        with open(cfg.target, "w", newline="") as file:
            csv.writer(file).writerows(rows)
        print(f"{cfg.target} ({counted(len(paths), 'image')})")


def class_names(about: dict[str, Any]) -> list[str]:
    """The names of a model's classes; where none are known, ImageNet's, or class 0, 1, ..."""
    numbers = [f"class {label}" for label in range(about["num_classes"])]
    unknown = ImageNetInfo().label_names() if len(numbers) == 1000 else numbers
    return in_words(about["classes"] or unknown)


def image_paths(images: Any, most: int | None = None) -> list[Path]:
    """List the named images, and `most` images spread over each folder (None: all)."""
    given: Any = OmegaConf.to_object(images) if OmegaConf.is_list(images) else images
    paths: list[Path] = []
    for path in (Path(name).expanduser() for name in listed(given)):
        if not path.exists():
            raise ValueError(f"images={path} does not exist: give a folder, an image, or a list")
        inside = [Path(name) for name in image_files(str(path))] if path.is_dir() else [path]
        count = min(most or len(inside), len(inside))
        paths += [inside[i * len(inside) // count] for i in range(count)]
    if not paths:
        raise ValueError(f"images={given}: no file there opens as an image")
    return paths


def read_pixels(paths: Iterable[Path], cfg: DictConfig) -> Tensor:
    """Crop images as in evaluations, to uint8 (B, 3, img_size, img_size)."""
    crop = evaluation_transform(cfg.img_size, cfg.crop_pct)
    return torch.stack([crop(load_image(path)) for path in paths])


@telling(lambda: "exporting")
def export(cfg: DictConfig) -> Path:
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
    generator, differences = torch.Generator().manual_seed(cfg.seed), list[float]()
    try:
        compute = write(model, about, unchecked)
        for batch in BATCHES:
            images = torch.randn(batch, 3, size, size, generator=generator)
            differences.append(float(np.abs(compute(images) - model(images).numpy()).max()))
            if not differences[-1] <= TOLERANCE:  # NaN is not
                text = f"at batch size {batch} the exported logits differ by {differences[-1]:.1e}"
                way = "where two tokens score alike that can be: another seed= has other images"
                raise RuntimeError(f"{text}; {way}")
        unchecked.replace(target)
    finally:
        unchecked.unlink(missing_ok=True)
    sizes, norm = ", ".join(map(str, BATCHES)), f"mean {about['mean']}, std {about['std']}"
    print(f"{target}: float32 images (batch, 3, {size}, {size}), normalised by {norm}, to logits")
    print(
        f"Compared with PyTorch at batch sizes {sizes}: largest difference {max(differences):.1e}"
    )
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
