"""One flat row per run: its numbers, and the hashes that say which runs can be compared."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from evit.report import results

Row = dict[str, Any]
# Values in which runs of one setting may differ.
OWN = {"seed", "name", "logger", "checkpoint", "overwrite"}
OWN_DATA = {"seed", "cache_dir", "num_workers", "batches_ahead"}
# Values in which a reduced model may differ from the dense run that it is compared with.
OWN_MODEL = {"_target_", "model_name", "pretrained", "keep_rate", "drop_loc", "fusion", "img_size"}
OWN_MODEL |= {"reducer"}
OWN_RECIPE = {"shrink_start_epoch", "shrink_epochs", "token_multiple", "ratio_weight"}
OWN_RECIPE |= {"distill_weight", "teacher", "max_batch_per_process", "eval_every"}


def row(result: dict[str, Any]) -> Row:
    """Make the row of a result.json; it names no folder of the machine."""
    config = result["config"]
    recipe = config["recipe"]
    limits = {name: recipe[name] for name in ("max_train_images", "max_val_images")}
    return results.summary(result) | dict(
        timm_name=timm_name(config["model"]),
        data=result["data"]["name"],
        num_classes=result["data"]["num_classes"],
        whole=not any(limits.values()),
        **limits,
        epochs=recipe["epochs"],
        from_checkpoint=bool(config["checkpoint"] or config.get("pretrained")),
        setting=setting(config),
        recipe=training(config, result["choices"].get("experiment")),
        started_from=result.get("started_from"),
        seed=config["seed"],
        **{key: result[key] for key in ("seconds", "device", "precision", "commit", "packages")},
    )


def setting(config: dict[str, Any]) -> str:
    """Hash a run's configuration; runs that differ by chance alone have the same hash."""
    same = {key: value for key, value in config.items() if key not in OWN}
    same["data"] = {key: value for key, value in same["data"].items() if key not in OWN_DATA}
    return digest(same)


def training(config: dict[str, Any], experiment: str | None) -> str:
    """Hash how a run was trained; a dense model and its reduced variants have the same hash."""
    model = {key: value for key, value in config["model"].items() if key not in OWN_MODEL}
    data = {key: value for key, value in config["data"].items() if key not in OWN_DATA}
    recipe = {key: value for key, value in config["recipe"].items() if key not in OWN_RECIPE}
    if experiment == "deit_s" and recipe["batch_size"] == 1024:
        recipe["batch_size"] = 2048  # as published: EViT's batch, and with it lr, is twice DeiT's
    name = re.sub("^(evit|dynamicvit)_|_224$", "", config["model"].get("model_name", ""))
    if model.keys() >= {"embed_dim", "depth", "num_heads"}:
        name = ""  # which only says the size
    fine_tuned = bool(config["checkpoint"] or config.get("pretrained"))
    return digest((name, config["img_size"], fine_tuned, model, data, recipe))


def started_from(checkpoint: str | None) -> str | None:
    """Identify a run's first weights: the setting of the run they come from, else their SHA-256."""
    if not checkpoint:
        return None
    folder = results.run_folder(checkpoint)
    if folder and (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        if "recipe" in config:  # or it is of another program
            return setting(config)
    return results.sha256(Path(checkpoint))


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def timm_name(model: dict[str, Any]) -> str | None:
    """The model's name in timm's registry, if nothing of its architecture was changed."""
    plain = {"_target_", "model_name", "pretrained", "keep_rate", "fusion", "img_size", "reducer"}
    return model.get("model_name") if model.keys() <= plain else None
