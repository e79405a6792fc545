"""Finished runs as one table: a line for each setting, the mean over its seeds."""

import hashlib
import json
import re
import statistics
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from evit.report import results

Row = dict[str, Any]
# What runs of one setting may differ in.
OWN = {"seed", "name", "logger", "checkpoint", "overwrite"}
OWN_DATA = {"seed", "cache_dir", "num_workers", "batches_ahead"}
# What an EViT or a DynamicViT may differ in from the dense run that it is compared with.
OWN_MODEL = {"_target_", "model_name", "pretrained", "keep_rate", "drop_loc", "fusion", "img_size"}
OWN_RECIPE = {"shrink_start_epoch", "shrink_epochs", "token_multiple", "ratio_weight"}
OWN_RECIPE |= {"distill_weight", "teacher", "max_batch_per_process", "eval_every"}


def row(result: dict[str, Any]) -> Row:
    """The numbers of a run, and where they come from; nothing of the machine's folders."""
    config = result["config"]
    recipe = config["recipe"]
    return results.summary(result) | dict(
        timm_name=timm_name(config["model"]),
        data=result["data"]["name"],
        num_classes=result["data"]["num_classes"],
        whole=not (recipe["max_train_images"] or recipe["max_val_images"]),
        epochs=recipe["epochs"],
        from_checkpoint=bool(config["checkpoint"] or config.get("pretrained")),
        setting=setting(config),
        recipe=training(config, result["choices"].get("experiment")),
        started_from=result.get("started_from"),
        seed=config["seed"],
        **{key: result[key] for key in ("seconds", "device", "precision", "commit", "packages")},
    )


def setting(config: dict[str, Any]) -> str:
    """A hash of a run's configuration, the same for runs that differ by chance alone."""
    same = {key: value for key, value in config.items() if key not in OWN}
    same["data"] = {key: value for key, value in same["data"].items() if key not in OWN_DATA}
    return digest(same)


def training(config: dict[str, Any], experiment: str | None) -> str:
    """A hash of how a run was trained, the same for a dense model and for its EViT: all that
    chance and keeping fewer tokens do not change.
    """
    model = {key: value for key, value in config["model"].items() if key not in OWN_MODEL}
    data = {key: value for key, value in config["data"].items() if key not in OWN_DATA}
    recipe = {key: value for key, value in config["recipe"].items() if key not in OWN_RECIPE}
    if experiment == "deit_s" and recipe["batch_size"] == 1024:
        recipe["batch_size"] = 2048  # as published, with lr in proportion: EViT's is twice DeiT's
    name = re.sub("^(evit|dynamicvit)_|_224$", "", config["model"].get("model_name", ""))
    if model.keys() >= {"embed_dim", "depth", "num_heads"}:
        name = ""  # which only says the size
    fine_tuned = bool(config["checkpoint"] or config.get("pretrained"))
    content = name, config["img_size"], fine_tuned, model, data, recipe
    return digest(content)


def started_from(checkpoint: str | None) -> str | None:
    """What a run began with: the setting of the run that left the checkpoint, else its SHA-256."""
    if not checkpoint:
        return None
    if folder := results.run_folder(checkpoint):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return setting(json.loads((folder / "config.json").read_text()))
    return results.sha256(Path(checkpoint))


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def timm_name(model: dict[str, Any]) -> str | None:
    """The model's name in timm's registry, if nothing of its architecture was changed."""
    plain = {"_target_", "model_name", "pretrained", "keep_rate", "fusion", "img_size"}
    return model.get("model_name") if model.keys() <= plain else None


def settings(rows: list[Row]) -> list[list[Row]]:
    """The runs of each setting, the settings with most MACs first.

    Raises:
        ValueError: two runs of one setting have the same seed.
    """
    groups: dict[Any, list[Row]] = defaultdict(list)
    for r in rows:
        groups[r["setting"], r["from_checkpoint"]].append(r)
    for group in groups.values():
        if len({r["seed"] for r in group}) < len(group):
            raise ValueError(
                f"{len(group)} runs of {group[0]['model']} at keep rate {group[0]['keep_rate']} "
                f"share a seed: give runs=FOLDER with each run once"
            )
    return sorted(groups.values(), key=lambda group: -group[0]["macs"])


def markdown(rows: list[Row]) -> str:
    """A Markdown table: a line for each setting, the mean and standard deviation over its seeds.

    Raises:
        ValueError: two runs of one setting have the same seed.
    """
    groups = settings(rows)
    lines = [
        "| model | keep rate | the rest | top-1 | top-5 | GMACs | M parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in groups:
        first = group[0]
        rest = "-" if first["keep_rate"] == 1 else "fused" if first["fusion"] else "dropped"
        start = ", fine-tuned" if first["from_checkpoint"] else ""
        lines.append(
            f"| {plain(first['model'])}{start} | {first['keep_rate']} | {rest} "
            f"| {spread(group, 'top1')} "
            f"| {spread(group, 'top5')} | {first['macs'] / 1e9:.4f} "
            f"| {first['params'] / 1e6:.2f} |"
        )
    runs = {len(group) for group in groups}
    seeds = "/".join(map(str, sorted(runs)))
    devices = ", ".join(sorted({r["device"] for r in rows}))
    commits = ", ".join(sorted({str(r["commit"]) for r in rows}))
    torch = ", ".join(sorted({str(r["packages"]["torch"]) for r in rows}))
    data = "; ".join(
        sorted(
            f"{name}, {size} px, {epochs} epoch" + "s" * (epochs > 1)
            for name, size, epochs in {(r["data"], r["img_size"], r["epochs"]) for r in rows}
        )
    )
    means = f"Mean and standard deviation of {seeds} runs with seeds of their own."
    note = f"{data}. {means if runs != {1} else 'One run each.'} "
    note += f"{devices}; commit {commits}; torch {torch}."
    return "\n".join([*lines, "", plain(note)]) + "\n"


def plain(text: str) -> str:
    """What neither Markdown nor HTML in it takes for its own."""
    return re.sub(r"([|\[])", r"\\\1", text).replace("<", "&lt;")


def spread(group: list[Row], key: str) -> str:
    """The mean and, of several runs, the standard deviation."""
    values = [r[key] for r in group]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"
