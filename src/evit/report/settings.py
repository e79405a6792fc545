"""One frame of settings, ours and the paper's, from which all tables and charts are made.

Its columns:

- section: "fashion-mnist, 28 px"; the settings in it can be compared. table: the paper's.
- model: of conf/model, timm's name, or a key of paper.yaml; name: timm's, the same for a dense
  model and its reduced variants; reducer: "" if dense; rate: "dense", "0.7" or "0.9,0.8,0.7";
  selection: "" for the attentive tokens; rest: "fused" or "dropped".
- start: from scratch, fine-tuned, off the shelf, or the keep rate that the evaluated checkpoint was
  trained at; epochs; images: their limits as text; val_images: 0 for all.
- runs: number of seeds; top1, top5 (%) and kl, their means; spread: deviation of top1; macs (1e9
  per image); params (1e6); images_per_s.
- setting, recipe: hashes of results.py and collect.py; origin: the setting, or the SHA-256, of the
  first weights; way: how images_per_s was measured.
- dense: the index of the dense setting that this one is compared with, or -1; change: points of
  top-1 above that one; share: % of its MACs; faster: times its images/s, or those of the dense
  model in the same benchmark.
"""

import re
from typing import Any

import pandas as pd

from evit.config import listed
from evit.report import REST, Row, collect, paper
from evit.report.collect import Found

DENSE, SCRATCH, TUNED, SHELF = "dense", "from scratch", "fine-tuned", "off the shelf"
METRICS = "top1 spread top5 kl macs params images_per_s change share faster".split()
TEXTS = "section table name reducer rest selection images setting recipe origin way".split()
DEFAULTS: Row = dict.fromkeys([*METRICS, "epochs"], float("nan")) | dict.fromkeys(TEXTS, "")
DEFAULTS |= dict(rate=DENSE, start=SCRATCH, val_images=0, runs=1, dense=-1)
SPEEDS = ["images_per_s", "faster", "way"]
TIMED = ["name", "reducer", "rate", "rest", "img_size"]  # what a measured speed belongs to


def frame(found: list[Row]) -> pd.DataFrame:
    """Make a frame of settings from rows that leave out what is as in DEFAULTS."""
    made = pd.DataFrame([DEFAULTS | row for row in found], columns=["model", "img_size", *DEFAULTS])
    return made.astype(dict.fromkeys([*METRICS, "epochs"], float) | dict(img_size=int))


def choices(reducer: str, rates: Any, fusion: bool | None) -> Row:
    """Make the columns that say how tokens are reduced; {} for a dense model."""
    rate = ",".join(f"{rate:g}" for rate in listed(rates))
    if len(set(rate.split(","))) == 1:
        rate = rate.split(",")[0]
    if rate in ("1", ""):
        return {}
    return dict(reducer=reducer, rate=rate, rest=REST[fusion] if reducer == "evit" else "")


def published() -> pd.DataFrame:
    """Make the settings of the paper's tables; in each, the dense model comes first."""
    found = [
        {key: row[key] for key in ("table", "model", "img_size", "epochs", "top1", "macs", "top5")}
        | choices(row["reducer"], row["keep_rate"], row["fusion"])
        | dict(images_per_s=row["throughput"], faster=row["ratio"])
        | dict(start=TUNED if row["finetuned"] else SCRATCH)
        for row in paper.training_runs()
    ]
    found += [
        dict(table="off_the_shelf", start=SHELF, img_size=paper.BASE_SIZE)
        | choices("evit", row["keep_rate"], fusion)
        | dict(model=row["model"], top1=row["top1"])
        for row in paper.TABLES["off_the_shelf"]["rows"]
        for fusion in (True, False)[: 1 if row["keep_rate"] == 1 else 2]  # which is not published
    ]
    names = {key: canonical(model["timm"][-1]) for key, model in paper.MODEL_LIST.items()}
    return frame([row | dict(name=names[row["model"]]) for row in found])


def ours(content: Found) -> pd.DataFrame:
    """Make the settings of our runs, the mean over the seeds of each, and of our evaluations."""
    runs = frame([of_run(row) for row in content.runs.values()])
    seeds = runs.groupby(["setting", "start"], sort=False)
    one_way = runs.groupby("section").way.transform("nunique") == 1
    speeds = seeds.images_per_s.transform("median")  # a busy machine moves it less than the mean
    means = {key: seeds[key].transform("mean") for key in ("top1", "top5")}
    runs = runs.assign(spread=seeds.top1.transform("std"), runs=seeds.top1.transform("size"))
    runs = runs.assign(**means, images_per_s=speeds.where(one_way)).loc[seeds.cumcount() == 0]
    runs = runs.sort_values("macs", ascending=False, kind="stable")
    evaluated = frame([row for one in content.evaluations for row in of_evaluation(one)])
    parts = [part for part in (runs, evaluated) if len(part)] or [runs]
    points = pd.concat(parts).drop_duplicates(ignore_index=True)
    for _, group in points.groupby("section"):
        found = measured(content, group)
        if found.faster.notna().any():
            points.loc[group.index, SPEEDS] = found[SPEEDS]
    return beside_dense(points)


def of_run(row: Row) -> Row:
    return (
        {key: row[key] for key in ("model", "img_size", "epochs", "setting", "recipe")}
        | choices(row["reducer"], row["keep_rate"], row["fusion"])
        | place(row)
        | dict(start=TUNED if row["from_checkpoint"] else SCRATCH, macs=row["macs"] / 1e9)
        | dict(top1=row["top1"], top5=row["top5"], images_per_s=row["throughput"])
        | dict(params=row["params"] / 1e6)
        | dict(name=canonical(row["timm_name"] or ""), origin=row["started_from"] or "")
        | dict(way=f"{row['device']}, {row['precision']}")
    )


def of_evaluation(result: Row) -> list[Row]:
    """Make the rows of an evaluation, of a run's checkpoint or else of a dense model's weights."""
    model, trained = result["model"], choices("", result["trained_keep_rate"] or [], None)
    rows = [choices(row["reducer"], row["keep_rate"], row["fusion"]) for row in result["settings"]]
    if result["trained_keep_rate"] is None and {} not in rows:
        return []  # nothing says that the weights are a dense model's
    limit, sha256 = result["config"]["max_val_images"], result["checkpoint_sha256"]
    limits = dict(max_train_images=None, max_val_images=limit, whole=not limit)
    given = dict(model=model["name"], img_size=model["img_size"], recipe=sha256, origin=sha256)
    data = dict(data=result["data"]["name"], num_classes=result["data"]["num_classes"])
    given |= place(limits | data | dict(img_size=model["img_size"]))
    given |= dict(start=f"trained at {trained['rate']}" if trained else SHELF)
    given |= dict(name=canonical(collect.timm_name(result["config"]["model"]) or ""))
    return [
        given
        | choice
        | dict(selection="" if row["selection"] in (None, "attentive") else row["selection"])
        | dict(params=model["params"] / 1e6, macs=row["macs"] / 1e9)
        | {key: row[key] for key in ("top1", "top5", "kl")}
        for row, choice in zip(result["settings"], rows, strict=True)
        if row["macs"] is not None
    ]


def place(row: Row) -> Row:
    """Make the columns of what can be compared: the data set and, but for ImageNet, the size."""
    whole_imagenet = row["num_classes"] == 1000 and row["whole"]
    section = "ImageNet" if whole_imagenet else f"{row['data']}, {row['img_size']} px"
    limits = dict(training=row["max_train_images"], validation=row["max_val_images"])
    images = ", ".join(f"{count} {name}" for name, count in limits.items() if count)
    images = images or {True: "", False: "limited", None: "unknown"}[row["whole"]]
    return dict(section=section, images=images, val_images=row["max_val_images"] or 0)


def canonical(timm_name: str) -> str:
    """Strip a timm name to what a dense model and its EViT share."""
    return re.sub(r"^evit_|_224$", "", timm_name)


def base(models: pd.Series) -> pd.Series:
    """Strip names of conf/model or the paper to what dense and reduced models share."""
    return models.str.replace("^(evit|dynamicvit)_", "", regex=True)


def recipe_names(points: pd.DataFrame) -> pd.Series:
    """Take the hash of the recipe of settings that nothing else tells apart, else ""."""
    kind = base(points.model).where(points.start != TUNED, points.model)
    recipe = points.recipe.replace("", None).str[:8]
    alike = recipe.groupby([kind, points.start, points.epochs, points.img_size], dropna=False)
    return recipe.where(alike.transform("nunique") > 1, "").fillna("")


def beside_dense(points: pd.DataFrame) -> pd.DataFrame:
    """Compare each setting with a dense one, in the columns dense, change, share and faster.

    That one was trained by the same recipe: as long, on as many images of the same size. Else, a
    fine-tuned run is compared with the run or weights that it began with.
    """
    points = points.assign(kind=base(points.model), dense=points.index)
    dense = points[(points.rate == DENSE) & points.top1.notna()]
    began = points.origin.where((points.start == TUNED) & (points.origin != ""))

    def find(wanted: pd.DataFrame, among: pd.DataFrame) -> pd.Series:
        among = among.sort_values("runs", ascending=False, kind="stable")
        keys = list(wanted.columns)
        pairs = wanted.merge(among.drop_duplicates(keys)[[*keys, "dense"]], on=keys, how="left")
        return pairs.dense.set_axis(points.index)

    same = points[["kind", "val_images", "start", "origin", "recipe", "img_size"]]
    source = points[["kind", "val_images"]].assign(origin=began)
    sources = pd.concat([dense.assign(origin=dense.setting), dense])
    index = find(same, dense).fillna(find(source, sources)).fillna(-1).astype(int)
    beside = points[METRICS].reindex(index).set_axis(points.index)
    return points.drop(columns="kind").assign(
        dense=index,
        change=points.top1 - beside.top1,
        share=100 * points.macs / beside.macs,
        faster=points.faster.fillna(points.images_per_s / beside.images_per_s),
    )


def measured(content: Found, points: pd.DataFrame) -> pd.DataFrame:
    """Look up the measured speeds of settings, all of one device, batch size and precision.

    Returns:
        SPEEDS, in the way in which most were measured, and macs, with the index of points.
    """
    timed = []
    for result, row in ((one, row) for one in content.benchmarks for row in one["rows"]):
        size = paper.BASE_SIZE if row["model"] in paper.NAMES else row["img_size"]
        if row["what"] == "inference" and row["compared_with"].endswith(f"={size}"):
            way = f"{result['device']}, batch {row['batch_size']:g}, {row['precision']}"
            way += f", compile={row['compile']}" * bool(row["compile"])
            rate = 1 if row["dense"] else row["keep_rate"]
            timed.append(
                choices(row.get("reducer") or paper.reducer(row["model"]), rate, row["fusion"])
                | dict(way=way, name=canonical(row["model"]), img_size=row["img_size"])
                | dict(images_per_s=row["images_per_s"], faster=row["ratio"])
                | dict(macs=row["macs"] / 1e9)
            )
    numbers = [*SPEEDS, "macs"]
    speeds = frame(timed).drop_duplicates(["way", *TIMED], keep="last")[[*TIMED, *numbers]]
    both = points[TIMED].reset_index().merge(speeds, on=TIMED)
    best = max(speeds.way.unique(), key=both.way.tolist().count, default="")
    return both[both.way == best].set_index("index")[numbers].reindex(points.index)


def beside_paper(content: Found, points: pd.DataFrame, table: str) -> tuple[str, Any, Any]:
    """Find our settings for the rows of a table of the paper.

    Returns:
        How our speeds were measured, "" if they were not; the rows; and ours with the same index
        and columns, whose metrics are NaN where nothing was run.
    """
    theirs = published().query("table == @table")
    mine = points[(points.section == "ImageNet") & (points.selection == "")]
    mine = mine.assign(model=mine.model.map(paper.CONF))
    keys, numbers = "model reducer rate rest img_size start".split(), [*METRICS, "runs"]
    both = theirs[[*keys, "epochs"]].reset_index().merge(mine, on=keys, suffixes=("_paper", ""))
    # LV-ViT's 300 epochs are 310 with those at its last learning rate.
    fits = both.epochs.between(both.epochs_paper, 1.1 * both.epochs_paper)
    both = both[fits | both.epochs_paper.isna()].drop_duplicates("index").set_index("index")
    own, speeds = both[numbers].reindex(theirs.index), measured(content, theirs)
    own["faster"] = float("nan")  # but for what was measured in one way
    own.update(speeds)
    return next(iter(speeds.way.dropna()), ""), theirs, own
