"""Finished runs as one table: a line for each setting, the mean over its seeds."""

import hashlib
import json
import re
import statistics
from collections import defaultdict
from typing import Any

from evit.report import results

Row = dict[str, Any]
# What runs of one setting may differ in.
OWN = {"seed", "name", "logger", "checkpoint", "overwrite"}
OWN_DATA = {"seed", "cache_dir", "num_workers", "batches_ahead"}


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
        seed=config["seed"],
        **{key: result[key] for key in ("seconds", "device", "precision", "commit", "packages")},
    )


def setting(config: dict[str, Any]) -> str:
    """A hash of a run's configuration, the same for runs that differ by chance alone."""
    same = {key: value for key, value in config.items() if key not in OWN}
    same["data"] = {key: value for key, value in same["data"].items() if key not in OWN_DATA}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]


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
    data = ", ".join(
        sorted({f"{r['data']}, {r['img_size']} px, {r['epochs']} epochs" for r in rows})
    )
    note = (
        f"{data}. Mean and standard deviation of {seeds} runs with seeds of their own. "
        f"{devices}; commit {commits}; torch {torch}."
    )
    return "\n".join([*lines, "", plain(note)]) + "\n"


def plain(text: str) -> str:
    """What neither Markdown nor HTML in it takes for its own."""
    return re.sub(r"([|\[])", r"\\\1", text).replace("<", "&lt;")


def spread(group: list[Row], key: str) -> str:
    """The mean and, of several runs, the standard deviation."""
    values = [r[key] for r in group]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"
