"""Build the data, model and loss of a configuration; and the plan of a run, for --dry-run."""

from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from evit import load_checkpoint, measure
from evit.config import Recipe, listed
from evit.data.order import epoch_length
from evit.measure.speed import keep_compiled
from evit.models.registry import check_images
from evit.models.weights import read_state_dict
from evit.reducers import keep_rate_at
from evit.report import paper, results
from evit.training.losses import dense_teacher, make_objective
from evit.training.module import Classifier, lr_at, mix_seed

IMAGENET = dict(name="ImageNet", num_classes=1000, train_images=1_281_167, val_images=50_000)
GPUS = 8  # of the estimate of hours


def build(node: Any, seed: int, img_size: int, **options: Any) -> Any:
    """Build the model of a node of conf/model, initialised from a seed."""
    torch.manual_seed(seed)
    model = instantiate(node, **options, _convert_="all")
    if not hasattr(model, "reducer"):
        way = "take it with a reducer by model=timm_vit model.model_name=NAME"
        raise ValueError(f"{type(model).__name__} reduces no tokens: {way}")
    check_images(model, img_size)
    return model


def build_model(cfg: DictConfig, recipe: Recipe, num_classes: int, **options: Any) -> Any:
    options |= dict(num_classes=num_classes, drop_path_rate=recipe.drop_path)
    return build(cfg.model, mix_seed(cfg.seed), cfg.img_size, **options)


def build_teacher(cfg: DictConfig, model: Any) -> Any:
    """Build the dense teacher, or return None; DynamicViT's is the model that it starts from."""
    wanted, path = cfg.recipe.teacher, cfg.recipe.teacher or cfg.checkpoint
    if not wanted and not model.reducer.masked:
        return None
    weights = read_state_dict(path) if path else {}
    own = (getattr(model, "pretrained_cfg", None) or {}) if cfg.pretrained else {}
    classes = len(weights["head.weight"]) if "head.weight" in weights else own.get("num_classes")
    if classes != model.num_classes and not wanted:
        return None  # its logits are of other classes
    teacher = dense_teacher(model)
    if weights:
        load_checkpoint(teacher, weights, new_parts=True)
    return teacher


def build_module(cfg: DictConfig, recipe: Recipe, data: Any, config: Any) -> Any:
    """Build the LightningModule: model, weights, loss, and the knobs that checkpoints store."""
    model = build_model(cfg, recipe, data.num_classes)
    data.normalize_for(model)
    if not hasattr(model, "heads"):
        data.label_maps = None  # LV-ViT alone learns from them: announce() says so
    if cfg.checkpoint:
        load_checkpoint(model, cfg.checkpoint, new_head=True, new_parts=True)
    teacher, sizes = build_teacher(cfg, model), (data.num_classes, data.local_batch_size)
    objective = make_objective(model, recipe, *sizes, data.has_label_maps, teacher)
    knobs = {k: config[k] for k in ("model", "keep_rate", "fusion", "img_size", "crop_pct")}
    knobs |= dict(data=data.name, classes=list(data.classes))
    knobs |= dict(mean=list(data.mean), std=list(data.std))
    module = Classifier(model, recipe, data.num_classes, objective, cfg.seed, knobs)
    if cfg.compile:
        compile_all(model, objective, cfg.compile)
    return module


def compile_all(model: Any, objective: Any, how: Any = True) -> None:
    """Compile model and losses in place, one graph for each combination of token counts."""
    keep_compiled()
    options: Any = dict(fullgraph=True, dynamic=False, mode=None if how is True else how)
    model.compile(**options)
    objective.losses = torch.compile(objective.losses, **options)


def run(cfg: DictConfig) -> None:
    """Print the plan of a composed configuration; nothing is trained, downloaded or written."""
    found = plan(cfg)
    for name, values in found["schedule"].items():  # every tenth epoch and the last, or one for all
        values = [results.one_rate([float(f"{r:.4g}") for r in listed(value)]) for value in values]
        shown = sorted({*range(0, len(values), 10), len(values) - 1})
        same = all(value == values[0] for value in values)
        found["schedule"][name] = values[0] if same else {epoch: values[epoch] for epoch in shown}
    found["paper"] = [f"{row['top1']} top-1 ({row['table']})" for row in found["paper"]]
    if found["hours"]:
        found["hours"] = f"about {found['hours']:.0f} h on {GPUS} A100, from the paper's images/s"
    print(yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=100), end="")


def plan(cfg: DictConfig) -> dict[str, Any]:
    """What a run would do beyond what its configuration says; rates are one for each epoch."""
    recipe: Any = OmegaConf.to_object(cfg.recipe)
    data = data_facts(cfg, recipe)
    steps = epoch_length(data["train_images"], recipe.repeated_augmentations) // recipe.batch_size
    if not steps:
        raise ValueError(f"{data['train_images']} images fill no step: lower recipe.batch_size")
    with torch.device("meta"):
        model = build_model(cfg, recipe, data["num_classes"], pretrained=False)
    parts = (model, recipe, data["num_classes"])
    objective = make_objective(*parts, recipe.batch_size, data["label_maps"])
    Classifier(*parts, objective)  # refuses what a run would
    masked = model.reducer.masked  # DynamicViT
    start = "missing" if recipe.finetune else "random"
    start = "checkpoint" if cfg.checkpoint else "pretrained" if cfg.pretrained else start
    shrink = (0, 0) if masked else (recipe.shrink_start_epoch, recipe.shrink_epochs)
    epochs, final = range(recipe.epochs), list(model.keep_rate)
    keep_rates = [list(keep_rate_at(epoch, 1, final, *shrink)) for epoch in epochs]
    labelled = data["label_maps"] or masked or not hasattr(model, "heads")
    rows, hours = list[Any](), None
    if data["name"] == IMAGENET["name"] and len(set(final)) == 1 and labelled:
        facts = dict(img_size=cfg.img_size, finetuned=recipe.finetune, keep_rate=final[0])
        facts |= dict(epochs=round(recipe.epochs - recipe.cooldown_epochs))
        facts |= dict(fusion=None if final[0] == 1 or masked else model.fusion)
        rows = paper.runs(cfg.model.model_name, **facts)
    if rows:
        macs = dict[Any, int]()  # of an image, by its keep rates
        for rates in set(map(tuple, keep_rates)):
            model.set_keep_rate(rates)
            macs[rates] = measure.count_macs(model)
        passes: float = 4 if masked and (recipe.teacher or cfg.checkpoint or cfg.pretrained) else 3
        passes *= sum(macs[tuple(rates)] for rates in keep_rates) / macs[tuple(keep_rates[-1])]
        speed = paper.dense_throughput("deit_s") if masked else rows[0]["throughput"]
        hours = steps * recipe.batch_size * passes / (speed * GPUS) / 3600
    schedule = dict(lr=[lr_at(epoch, recipe) for epoch in epochs], keep_rate=keep_rates)
    found = dict(data=data, start=start, steps_per_epoch=steps, loss=type(objective).__name__)
    return found | dict(schedule=schedule, paper=rows, hours=hours)


def data_facts(cfg: DictConfig, recipe: Recipe) -> dict[str, Any]:
    """The images and classes that a run would have; ImageNet's where no folder of it is given."""
    imagenet = cfg.data.get("num_classes") == 1000
    if imagenet and not cfg.data.get("root"):
        facts: dict[str, Any] = IMAGENET | dict(label_maps=bool(cfg.data.label_maps))
    else:
        data = instantiate(cfg.data, recipe=recipe, _convert_="object")
        facts = dict(name=IMAGENET["name"] if imagenet else data.name, num_classes=data.num_classes)
        facts |= {f"{split}_images": data.num_images(split) for split in data.splits}
        facts |= dict(label_maps=data.has_label_maps)
    for split, limit in (("train", recipe.max_train_images), ("val", recipe.max_val_images)):
        facts[f"{split}_images"] = min(facts[f"{split}_images"], limit or facts[f"{split}_images"])
    return facts
