"""Use a trained model: evaluate it, draw which patches it keeps, predict classes, export it."""

import csv
import json
import logging
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from timm.data import ImageNetInfo

from evit import measure, reduce
from evit.commands import checkpoint
from evit.config import counted, listed
from evit.data.batch import normalize
from evit.data.folders import image_files, in_words, load_image
from evit.data.imagefolder import evaluation_transform
from evit.files import telling
from evit.measure.speed import keep_compiled
from evit.report import rate, results, show_evaluation
from evit.report.pictures import draw_kept
from evit.training import build_trainer, say
from evit.training.module import Evaluator, setting_of


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Run an evaluation; write evaluation.json into Hydra's run folder."""
    if {"keep_rate", "keep_rates"} <= checkpoint.given():
        raise ValueError("keep_rate has no effect beside keep_rates: give one of them")
    folder = Path(HydraConfig.get().runtime.output_dir)
    if nodes := list(checkpoint.reducer_nodes(cfg).values()):  # the model is built with the first
        cfg.reducer = nodes[0]
    model, about, cfg, source = checkpoint.opened(cfg)
    gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    options = dict(max_epochs=1, enable_checkpointing=False, default_root_dir=folder)
    trainer = build_trainer(cfg.trainer, "bf16-true", **options)
    batch_size = cfg.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    data = checkpoint.validation(cfg, batch_size, cfg.max_val_images)
    data.trainer = trainer
    data.mean, data.std = tuple(about["mean"]), tuple(about["std"])
    ours, theirs = list(data.classes), about["classes"] or [*range(about["num_classes"])]
    if len(ours) != len(theirs) or about["classes"] and ours != theirs:
        has = [f"has {len(names)} classes, {names[0]} to {names[-1]}" for names in (theirs, ours)]
        text = f"the checkpoint {has[0]}, and {data.name} {has[1]}: give the data"
        raise ValueError(f"{text} that it was trained on, data.root=DIR")
    reducers, costs = zip(*choose(config, nodes or [config["reducer"]], model, source), strict=True)
    evaluator = Evaluator(model, list(reducers), data.num_classes, cfg.seed)
    text = f"{data.name} ({data.num_classes} classes), read by {data.backend}"
    if cfg.max_val_images:
        text += f"; at most {cfg.max_val_images} images (max_val_images=null: all)"
    if compiled := gpu if cfg.compile is None else cfg.compile:
        keep_compiled()
        evaluator.compile_parts(cfg.batch_size)
        text += "; compiled, which takes a while at first (compile=false)"
    say(f"Evaluating {counted(len(reducers), 'setting')} on {text}")
    for step in data.prepare_data, data.setup:  # raises the errors of the data here
        rank_zero_only(step)()
    started = time.perf_counter()
    silent = trainer.progress_bar_callback or not trainer.is_global_zero
    with telling(lambda: "" if silent else evaluator.at):
        trainer.validate(evaluator, data, verbose=False)
    each = zip(evaluator.settings, evaluator.results, costs, strict=True)
    facts = dict(name=about["model"], img_size=data.img_size, params=measure.count_params(model))
    facts |= dict(drop_loc=list(model.drop_loc))
    settings = [setting._asdict() | found | cost for setting, found, cost in each]
    digest, trained = results.sha256(source.path), results.trained_keep_rate(source.run)
    result: dict[str, Any] = dict(checkpoint=str(source.path), checkpoint_sha256=digest)
    result |= dict(trained_keep_rate=trained, settings=settings, images=settings[0]["images"])
    result |= dict(data=dict(name=data.name, num_classes=data.num_classes, backend=data.backend))
    result |= dict(model=facts, config=config)
    result |= dict(precision=str(trainer.precision) + ", compiled" * compiled)
    result |= dict(device=results.device_name(trainer.strategy.root_device))
    result |= dict(processes=trainer.world_size, seconds=round(time.perf_counter() - started, 3))
    if trainer.is_global_zero:
        path, result = folder / "evaluation.json", result | results.provenance()
        results.write_json(result, path)
        show_evaluation(result, path)
    return result


def choose(config: dict[str, Any], nodes: list[Any], model: Any, source: Any) -> list[Any]:
    """All combinations of reducer, keep rate, fusion and selection, each once: (reducer, costs)."""
    rates, budgets = config["keep_rates"], listed(config["gmacs"] or [])
    rates = listed(rates or ([] if budgets else [config["keep_rate"]]))
    choices = {k: listed(config[k]) for k in ("selection", "fusion") if config[k] not in (None, [])}
    if not all(isinstance(value, bool) for value in choices.get("fusion", [])):
        raise ValueError(f"fusion must be true, false or [true,false], got {config['fusion']!r}")
    for node in nodes:
        if lacks := [k for k in choices if k in checkpoint.given() and k not in node]:
            name = node["_target_"].rpartition(".")[2]
            say(f"{name} has no {' and no '.join(lacks)}: ignored.")
    chosen: dict[Any, Any] = {}
    targets = [(share, None) for share in rates] + [(1.0, budget) for budget in budgets]
    for (share, budget), node in product(targets, nodes):
        own = {k: values for k, values in choices.items() if k in node}
        for values in product(*own.values()):
            wanted = node | dict(zip(own, values, strict=True), keep_rate=share)
            reduce(model, instantiate(wanted, _convert_="all"))
            checkpoint.load(model, source)
            if budget:
                measure.match_macs(model, budget)
            if (setting := setting_of(model.reducer)) not in chosen:
                costs = dict(macs=measure.count_macs(model))
                costs |= dict(macs_executed=measure.count_macs(model, executed=True))
                chosen[setting] = model.reducer, costs
    return list(chosen.values())


@telling(lambda: "drawing")
def visualize(cfg: DictConfig) -> None:
    if cfg.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {cfg.num_images}")
    model, about, cfg, _ = checkpoint.opened(cfg)
    target, truths = checkpoint.target_file(cfg, about, "pictures", ".png"), list[str]()
    if cfg.images is not None:
        pixels = read_pixels(image_paths(cfg.images, cfg.num_images), cfg)
    else:
        data = checkpoint.validation(cfg, cfg.num_images, cfg.num_images, ready=True)
        pixels, labels = next(iter(data.val_dataloader()))
        truths = [in_words(list(data.classes))[label] for label in labels]
    print(f"Drawing {counted(len(pixels), 'image')} at keep rate {rate(about)}", flush=True)
    names = [] if cfg.random else class_names(about)
    images = normalize(pixels, about["mean"], about["std"])
    picture = draw_kept(model, images, pixels, names, truths)
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target)
    print(f"{target} ({picture.width} x {picture.height} pixels)")


@telling(lambda: "predicting")
@torch.no_grad()
def predict(cfg: DictConfig) -> None:
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
    paths: list[Path] = []
    for path in (Path(i).expanduser() for i in ([images] if isinstance(images, str) else images)):
        if not path.exists():
            raise ValueError(f"images={path} does not exist: give a folder, an image, or a list")
        inside = [Path(name) for name in image_files(str(path))[0]] if path.is_dir() else [path]
        count = min(most or len(inside), len(inside))
        paths += [inside[i * len(inside) // count] for i in range(count)]
    if not paths:
        raise ValueError(f"images={images}: no file there opens as an image")
    return paths


def read_pixels(paths: list[Path], cfg: DictConfig) -> torch.Tensor:
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
        for batch in (1, 2, 5):  # it is exported at another
            images = torch.randn(batch, 3, size, size, generator=generator)
            differences.append(float(np.abs(compute(images) - model(images).numpy()).max()))
            if not differences[-1] <= 1e-4:  # NaN is not
                text = f"at batch size {batch} the exported logits differ by {differences[-1]:.1e}"
                raise RuntimeError(f"{text}; where two tokens score alike, another seed= helps")
        unchecked.replace(target)
    finally:
        unchecked.unlink(missing_ok=True)
    norm, most = f"mean {about['mean']}, std {about['std']}", max(differences)
    print(f"{target}: float32 images (batch, 3, {size}, {size}), normalised by {norm}, to logits")
    print(f"Compared with PyTorch at batch sizes 1, 2, 5: largest difference {most:.1e}")
    return target


def example(about: dict[str, Any]) -> dict[str, Any]:
    """Example arguments for exporters: images, with a dynamic batch size."""
    images = torch.zeros(3, 3, about["img_size"], about["img_size"])
    return dict(args=(images,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}})


def write_pt2(model: Any, about: dict[str, Any], path: Path) -> Any:
    """Write a torch.export file; return a function that runs it, as write_onnx does."""
    program = torch.export.export(model, **example(about))
    torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    module = torch.export.load(path).module()
    return lambda images: module(images).numpy()


def write_onnx(model: Any, about: dict[str, Any], path: Path) -> Any:
    import onnxruntime
    import onnxscript  # noqa: F401

    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # they tell what they rewrite
        logging.getLogger(name).setLevel(logging.ERROR)
    options: Any = dict(input_names=["images"], output_names=["logits"], dynamo=True, verbose=False)
    with warnings.catch_warnings(action="ignore"):  # from inside the exporter
        program: Any = torch.onnx.export(model, **example(about), **options, opset_version=20)
    program.model.metadata_props.update({k: json.dumps(v) for k, v in about.items()})
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images.numpy()})[0]


FORMATS = dict(onnx=(".onnx", write_onnx), torch_export=(".pt2", write_pt2))
