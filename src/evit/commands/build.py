"""Build the data, model and teacher of a configuration, for a run and for its plan."""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from evit import load_checkpoint
from evit.config import Recipe
from evit.data import Images
from evit.measure.speed import keep_compiled
from evit.models.patches import check_images
from evit.models.weights import read_state_dict
from evit.training.losses import dense_teacher, make_objective
from evit.training.module import Classifier, mix_seed


def build_data(cfg: DictConfig, recipe: Recipe) -> Images:
    """Build the data module of a configuration; nothing is read or written yet."""
    return instantiate(cfg.data, recipe=recipe, _convert_="object")


def build_model(cfg: DictConfig, recipe: Recipe, num_classes: int, **options: Any) -> Any:
    """Build the model of a configuration, initialised from its seed."""
    torch.manual_seed(mix_seed(cfg.seed))
    options |= dict(num_classes=num_classes, drop_path_rate=recipe.drop_path)
    return instantiate(cfg.model, **options, _convert_="all")


def build_teacher(cfg: DictConfig, model: Any) -> Any:
    """Build the dense teacher, or return None; DynamicViT's is the model that it starts from."""
    source, reducer = cfg.recipe.teacher, getattr(model, "reducer", None)
    rates = reducer is not None and not (reducer.masked or reducer.own or reducer.given)
    if source and (reducer is None or (source == "self" and not rates)):
        kind = "models with a reducer" if reducer is None else "reducers of keep rates"
        raise ValueError(f"recipe.teacher={source} is for {kind}: leave it out, or give a PATH")
    if source == "self" or reducer is None or not (source or reducer.masked):
        return source
    source = source or cfg.checkpoint
    if not source and not cfg.pretrained:
        return None
    weights = read_state_dict(source) if source else {}
    own = getattr(model, "pretrained_cfg", None) or {}
    classes = len(weights["head.weight"]) if "head.weight" in weights else own.get("num_classes")
    if classes != model.num_classes and not cfg.recipe.teacher:
        return None  # its logits are of other classes
    teacher = dense_teacher(model)
    if source:
        load_checkpoint(teacher, weights, new_parts=True)
    return teacher


def build_module(
    cfg: DictConfig, recipe: Recipe, data: Images, config: dict[str, Any]
) -> Classifier:
    """Build the LightningModule: model, weights, loss, and the knobs that checkpoints store."""
    model = build_model(cfg, recipe, data.num_classes)
    check_images(model, cfg.img_size)
    data.normalize_for(model)
    if not hasattr(model, "heads"):
        data.label_maps = None  # LV-ViT alone learns from them: announce() says so
    if cfg.checkpoint:
        load_checkpoint(model, cfg.checkpoint, new_head=True, new_parts=True)
    teacher, sizes = build_teacher(cfg, model), (data.num_classes, data.local_batch_size)
    objective = make_objective(model, recipe, *sizes, data.has_label_maps, teacher)
    names = ("model", "keep_rate", "fusion", "img_size", "crop_pct")
    knobs: dict[str, Any] = {name: config[name] for name in names} | dict(
        data=data.name, classes=list(data.classes), mean=list(data.mean), std=list(data.std)
    )
    module = Classifier(model, recipe, data.num_classes, objective, cfg.seed, knobs)
    if cfg.compile:
        compile_all(model, objective, cfg.compile)
    return module


def compile_all(model: Any, objective: Any, how: Any = True) -> None:
    """Compile model and losses in place, one graph for each combination of token counts.

    Args:
        how: True, or the name of one of torch.compile's modes.
    """
    keep_compiled()
    mode = None if how is True else how
    model.compile(fullgraph=True, dynamic=False, mode=mode)
    objective.losses = torch.compile(objective.losses, fullgraph=True, dynamic=False, mode=mode)
