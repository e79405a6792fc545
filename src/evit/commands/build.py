"""The data, the model and the teacher of a configuration, for a run and for its plan."""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from evit import load_checkpoint
from evit.data import Images
from evit.measure.speed import allow_graphs
from evit.models.weights import read_state_dict
from evit.recipe import Recipe
from evit.training.losses import Classification, dense_teacher
from evit.training.module import mix_seed


def build_data(cfg: DictConfig, recipe: Recipe) -> Images:
    """The data module of a configuration; nothing is read or written yet."""
    return instantiate(cfg.data, recipe=recipe, _convert_="object")


def build_model(cfg: DictConfig, recipe: Recipe, num_classes: int, **options: Any) -> Any:
    """The model of a configuration, drawn from its seed."""
    torch.manual_seed(mix_seed(cfg.seed))
    options |= dict(num_classes=num_classes, drop_path_rate=recipe.drop_path)
    return instantiate(cfg.model, **options, _convert_="all")


def build_teacher(cfg: DictConfig, model: Any) -> Any:
    """The dense model that DynamicViT is distilled from, where there are weights of one."""
    source = cfg.recipe.teacher or cfg.checkpoint
    if not (hasattr(model, "reducer") and model.reducer.masked):
        if cfg.recipe.teacher:
            raise ValueError(f"recipe.teacher={cfg.recipe.teacher} is for DynamicViT alone")
        return None
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


def compile_all(model: torch.nn.Module, objective: Classification, how: Any = True) -> None:
    """torch.compile, in place: one graph for each combination of token counts.

    Args:
        how: True, or the name of one of torch.compile's modes.
    """
    allow_graphs()
    mode = None if how is True else how
    model.compile(fullgraph=True, dynamic=False, mode=mode)
    objective.compile(mode=mode)
