"""One table of settings, ours and the paper's, and the dense model that each is compared with.

The columns of a frame of settings:

- section: what can be compared, "fashion-mnist, 28 px"; table: the paper's (published rows).
- model: of conf/model, timm's name, or a key of paper.yaml; name: timm's, the same for a dense
  model and its reduced variants; reducer: "" if dense; rate: one number or a tuple; selection: ""
  for the attentive tokens; rest: "fused" or "dropped".
- start: from scratch, fine-tuned, off the shelf, or the keep rate that the evaluated checkpoint was
  trained at; epochs; images: their limits as text; val_images: 0 for all.
- runs: how many seeds; top1, top5 (%) and kl, their means; spread: deviation of top1; macs (1e9 per
  image); params (1e6); images_per_s; speed: beside the dense model at the base size.
- setting, recipe: hashes of results.py and collect.py; origin: the setting, or the SHA-256, of the
  first weights; folder; recipe_name: set where lines would look the same otherwise.
"""

import os
import re
from typing import Any

import pandas as pd

from evit.report import collect, paper, results
from evit.report.collect import Found

SCRATCH, TUNED, SHELF = "from scratch", "fine-tuned", "off the shelf"
NAN = float("nan")
METRICS = ["top1", "spread", "top5", "kl", "macs", "images_per_s", "speed", "params"]
TEXTS = "section table name reducer rest selection images setting recipe origin folder recipe_name"
DEFAULTS: dict[str, Any] = dict.fromkeys([*METRICS, "epochs"], NAN) | dict.fromkeys(
    TEXTS.split(), ""
)
DEFAULTS |= dict(rate=1.0, start=SCRATCH, val_images=0, runs=1)
TIMED = ["name", "reducer", "rate", "rest", "img_size"]  # what a measured speed belongs to


def frame(found: list[dict[str, Any]]) -> pd.DataFrame:
    """Make a frame of settings from rows that leave out what is as in DEFAULTS."""
    made = pd.DataFrame([DEFAULTS | row for row in found], columns=["model", "img_size", *DEFAULTS])
    kinds: dict[str, Any] = dict.fromkeys([*METRICS, "epochs"], float)
    return made.astype(kinds | dict(rate=object, img_size=int))


def choices(reducer: str, rate: Any, fusion: bool | None) -> dict[str, Any]:
    """The columns that say how tokens are reduced."""
    rate = tuple(one) if isinstance(one := results.one_rate(rate), list) else one
    if rate in (1, ()):
        return {}
    rest = {True: "fused", False: "dropped", None: ""}[fusion] if reducer == "evit" else ""
    return dict(reducer=reducer, rate=rate, rest=rest)


def published() -> pd.DataFrame:
    """The rows of the paper's tables; in each, the dense model comes first."""
    found = [
        {key: row[key] for key in ("table", "model", "img_size", "epochs", "top1", "macs", "top5")}
        | choices(results.reducer_name(None, row["model"]), row["keep_rate"], row["fusion"])
        | dict(images_per_s=row["throughput"], speed=row["ratio"], setting=row["model"])
        | dict(start=TUNED if row["finetuned"] else SCRATCH)
        | dict(origin=row["model"].removeprefix("dynamicvit_") if row["finetuned"] else "")
        for row in paper.training_runs()
    ]
    given = dict(table="off_the_shelf", start=SHELF, img_size=paper.BASE_SIZE)
    found += [
        given
        | choices("evit", row["keep_rate"], fusion)
        | dict(model=row["model"], top1=row["top1"])
        for row in paper.TABLES["off_the_shelf"]["rows"]
        for fusion in (True, False)[: 1 if row["keep_rate"] == 1 else 2]  # which is not published
    ]
    names = {key: canonical(model["timm"][-1]) for key, model in paper.MODEL_LIST.items()}
    return frame([row | dict(name=names[row["model"]]) for row in found])


def ours(found: Found) -> pd.DataFrame:
    """Our runs, the mean over the seeds of each setting, and our evaluations."""
    made = [*runs(found), *(row for one in found.evaluations for row in evaluated(one))]
    points = frame(made).drop_duplicates(ignore_index=True)
    for title, group in points.groupby("section"):
        _, speeds = measured(found, group)
        own = [row for row in found.rows if section(row) == title]
        ways = {(row["device"], row["precision"]) for row in own}
        if len(ways) != 1 or speeds.speed.notna().any():
            points.loc[group.index, ["images_per_s", "speed"]] = speeds[["images_per_s", "speed"]]
    return told_apart(points)


def runs(found: Found) -> list[dict[str, Any]]:
    """The settings of our runs, those with most MACs first."""
    made = []
    groups: dict[Any, list[collect.Run]] = {}
    for run in found.runs:
        groups.setdefault((run.row["setting"], run.row["from_checkpoint"]), []).append(run)
    for group in sorted(groups.values(), key=lambda group: -group[0].row["macs"]):
        row, folder = group[0].row, os.path.dirname(group[0].name) or "."
        seeds = pd.DataFrame([run.row for run in group], columns=["top1", "top5", "throughput"])
        seeds = seeds.astype(float)
        made.append(
            {key: row[key] for key in ("model", "img_size", "epochs", "setting", "recipe")}
            | choices(row["reducer"], row["keep_rate"], row["fusion"])
            | dict(section=section(row), start=TUNED if row["from_checkpoint"] else SCRATCH)
            | dict(images=images(row), val_images=row.get("max_val_images") or 0)
            | dict(top1=seeds.top1.mean(), spread=seeds.top1.std(), top5=seeds.top5.mean())
            # A busy machine moves the median less than the mean.
            | dict(images_per_s=seeds.throughput.median(), runs=len(group), folder=folder)
            | dict(macs=row["macs"] / 1e9, params=row["params"] / 1e6)
            | dict(name=canonical(row["timm_name"] or ""), origin=row["started_from"] or "")
        )
    return made


def images(row: dict[str, Any]) -> str:
    """How the images of a run were limited."""
    limits = dict(training=row.get("max_train_images"), validation=row.get("max_val_images"))
    whole = row.get("whole")
    others = "unknown" if whole is None else "" if whole else "limited"
    return ", ".join(f"{count} {name}" for name, count in limits.items() if count) or others


def evaluated(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of an evaluation.

    Weights that no run of ours left are taken to be a dense model's, if it was evaluated too.
    """
    model, trained = result["model"], result["trained_keep_rate"]
    if trained is None:
        if not any(results.one_rate(row["keep_rate"]) in (1, []) for row in result["settings"]):
            return []
        trained = 1
    rate = choices("", trained, None).get("rate", 1)
    limit = result["config"]["max_val_images"] or 0
    limits = dict(img_size=model["img_size"], whole=not limit, max_val_images=limit)
    given = dict(model=model["name"], img_size=model["img_size"], val_images=limit)
    given |= dict(section=section(limits | dict(data=result["data"]["name"]) | result["data"]))
    given |= dict(images=images(limits), start=SHELF if rate == 1 else f"trained at {label(rate)}")
    given |= dict.fromkeys(("recipe", "origin"), result["checkpoint_sha256"])
    given |= dict(name=canonical(collect.timm_name(result["config"]["model"]) or ""))
    return [
        given
        | choices(row["reducer"], row["keep_rate"], row["fusion"])
        | dict(selection="" if row["selection"] in (None, "attentive") else row["selection"])
        | dict(params=model["params"] / 1e6, macs=row["macs"] / 1e9)
        | {key: row[key] for key in ("top1", "top5", "kl")}
        for row in result["settings"]
        if row["macs"] is not None
    ]


def section(row: dict[str, Any]) -> str:
    """What a run is compared within: the data set, and but for ImageNet the image size."""
    whole_imagenet = row["num_classes"] == 1000 and row["whole"]
    return "ImageNet" if whole_imagenet else f"{row['data']}, {row['img_size']} px"


def label(rate: Any) -> str:
    return ",".join(f"{one:g}" for one in (rate if isinstance(rate, tuple) else (rate,)))


def canonical(timm_name: str) -> str:
    """The same name for a dense model and its EViT."""
    return re.sub(r"^evit_|_224$", "", timm_name)


def base(model: str) -> str:
    """The same name for a dense model and its reduced variants, of conf/model or the paper."""
    return re.sub("^(evit|dynamicvit)_", "", model)


def told_apart(points: pd.DataFrame) -> pd.DataFrame:
    """Name the recipes of settings that would look the same: by folder, if it is the only one."""
    kind = points.model.map(base).where(points.start != TUNED, points.model)
    for _, group in points.groupby([kind, "start", "epochs", "img_size"], dropna=False):
        folders = group.drop_duplicates("recipe", keep="last").set_index("recipe").folder
        if len(folders) > 1:
            names = folders.where(~folders.duplicated(keep=False), folders.index.str[:8])
            points.loc[group.index, "recipe_name"] = group.recipe.map(names)
    return points


def with_dense(points: pd.DataFrame) -> pd.DataFrame:
    """Add dense (an index, or -1) and dense_top1, dense_macs, dense_images_per_s."""
    index = [dense_of(point, points) for _, point in points.iterrows()]
    dense = points[["top1", "macs", "images_per_s"]].reindex(index).set_axis(points.index)
    return points.assign(dense=index).join(dense.add_prefix("dense_"))


def dense_of(point: pd.Series, points: pd.DataFrame) -> Any:
    """The index of the dense setting that a setting is compared with, or -1.

    It was trained by the same recipe: as long, on as many images of the same size. A fine-tuned run
    may also be compared with what it began with, and an evaluation with that alone.
    """
    dense = points[(points.rate == 1) & points.top1.notna()]
    dense = dense[(dense.model.map(base) == base(point.model))]
    dense = dense[dense.val_images == point.val_images]
    trained = ["start", "origin", "recipe", "img_size"]
    found = dense[(dense[trained] == point[trained]).all(axis=1)]
    if found.empty and point.start == TUNED and point.origin:
        found = dense[(dense.setting == point.origin) | (dense.origin == point.origin)]
    return -1 if found.empty else found.runs.idxmax()


def measured(found: Found, points: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Look up the measured speeds of settings, all of one device, batch size and precision.

    Returns:
        How they were measured: in the way that has most of the settings. And a frame of
        images_per_s, speed and macs with the index of points, NaN where not measured.
    """
    timed = []
    for result, row in ((one, row) for one in found.benchmarks for row in one["rows"]):
        size = paper.BASE_SIZE if row["model"] in paper.NAMES else row["img_size"]
        if row["what"] == "inference" and row["compared_with"].endswith(f"={size}"):
            way = f"{result['device']}, batch {row['batch_size']:g}, {row['precision']}"
            reducer = results.reducer_name(row.get("reducer"), row["model"])
            timed.append(
                dict(
                    way=way + f", compile={row['compile']}" * bool(row["compile"]),
                    img_size=row["img_size"],
                )
                | choices(reducer, 1 if row["dense"] else row["keep_rate"], row["fusion"])
                | dict(model="", name=canonical(row["model"]), macs=row["macs"] / 1e9)
                | dict(images_per_s=row["images_per_s"], speed=row["ratio"])
            )
    speeds = frame(timed).assign(way=[row["way"] for row in timed])
    speeds = speeds.drop_duplicates(["way", *TIMED], keep="last")
    numbers = ["images_per_s", "speed", "macs"]
    both = points[TIMED].reset_index().merge(speeds[[*TIMED, "way", *numbers]], on=TIMED)
    best = max(speeds.way.unique(), key=both.way.tolist().count, default="")
    return str(best), both[both.way == best].set_index("index")[numbers].reindex(points.index)


def beside_paper(found: Found, points: pd.DataFrame, table: str) -> tuple[str, Any, Any]:
    """Find our settings for the rows of a table of the paper.

    Returns:
        How our speeds were measured, "" if they were not; the rows; and ours with the same index
        and columns, whose metrics are NaN where nothing was run.
    """
    theirs = published().query("table == @table")
    own = theirs.assign(**dict.fromkeys(METRICS, NAN))
    mine = points[(points.section == "ImageNet") & (points.selection == "")]
    mine = mine.assign(model=mine.model.map(paper.CONF))
    keys = ["model", "reducer", "rate", "rest", "img_size", "start"]
    for index, row in theirs.iterrows():
        same = mine[(mine[keys] == row[keys]).all(axis=1)]
        if pd.notna(row.epochs):  # LV-ViT's 300 are 310 with those at its last learning rate
            same = same[same.epochs.between(row.epochs, 1.1 * row.epochs)]
        if len(same):
            own.loc[index, [*METRICS, "runs"]] = same.iloc[0][[*METRICS, "runs"]]
    way, speeds = measured(found, theirs)
    own.update(speeds)
    return way if speeds.speed.notna().any() else "", theirs, own
