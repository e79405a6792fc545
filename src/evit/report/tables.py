"""One frame of settings, ours and the paper's, and the tables of the report made from it.

Settings of one section can be compared. rate: "dense", "0.7" or "0.9,0.8,0.7"; origin: the setting
or SHA-256 of the first weights; way: how images_per_s was measured; dense: the index of the dense
setting beside it, or -1; change, share, faster: points of top-1, % of MACs, times images/s."""

from typing import Any

import pandas as pd

from evit.config import listed
from evit.report import REST, Row, markdown, paper, plain, results
from evit.report.collect import Found, bare, timm_name

DENSE, SCRATCH, TUNED, SHELF = "dense", "from scratch", "fine-tuned", "off the shelf"
NUMBERS = "top1 spread top5 kl macs params images_per_s change share faster epochs runs".split()
TEXTS = "section table model name reducer rate rest selection start images".split()
TEXTS += "setting recipe origin".split()
OTHERS = ["img_size", "val_images", "seed", "way"]
SPEEDS = ["images_per_s", "faster", "way"]
TIMED = ["name", "reducer", "rate", "rest", "img_size"]  # what a measured speed belongs to
LABELS = dict(model="model", reducer="reducer", rate="keep rate", rest="the rest", selection="kept")
LABELS |= dict(img_size="px", start="weights", epochs="epochs", images="images", recipe="recipe")
LABELS |= dict(runs="runs")
METRICS = {  # of a table of the paper: column, format of theirs
    "top-1 (%)": ("top1", "{:.1f}"),
    "top-5 (%)": ("top5", "{:.1f}"),
    "speed-up (x dense)": ("faster", "{:.2f}"),
    "GMACs": ("macs", "{:.1f}"),
}
SHOWN = {  # of our settings: column, format
    "to dense": ("change", "{:+.2f}"),
    "top-5 (%)": ("top5", "{:.2f}"),
    "KL to dense": ("kl", "{:.4f}"),
    "GMACs": ("macs", "{:.4g}"),
    "M parameters": ("params", "{:.2f}"),
    "% of dense": ("share", "{:.0f}"),
    "speed-up": ("faster", "{:.2f}"),
}
NOTES = {  # by column
    "top-1 (%)": "The mean over the seeds of a setting, with the standard deviation.",
    "to dense": "To dense: points of top-1 beside the dense runs of the same recipe, or beside the "
    "model that was fine-tuned or evaluated.",
    "speed-up": "Speed-up: images/s beside the dense model's, by src/benchmark.py or by the runs.",
}


def frame(found: list[Row]) -> pd.DataFrame:
    """Make a frame of settings from rows, each once, which leave out what is not known."""
    made = pd.DataFrame(found, columns=[*NUMBERS, *TEXTS, *OTHERS], dtype=object)
    made = made.fillna(dict.fromkeys(TEXTS, "") | dict(val_images=0))
    return made.astype(dict.fromkeys(NUMBERS, float) | dict(img_size=int)).drop_duplicates()


def choices(reducer: str, rates: Any, fusion: bool | None) -> Row:
    rate = ",".join(f"{rate:g}" for rate in listed(results.one_rate(rates or 1)))
    if rate == "1":
        return dict(reducer="", rate=DENSE, rest="")
    return dict(reducer=reducer, rate=rate, rest=REST[fusion] if reducer == "evit" else "")


def published() -> pd.DataFrame:
    """Make the settings of the paper's tables; in each, the dense model comes first."""
    shelf = dict(table="off_the_shelf", start=SHELF, img_size=paper.BASE_SIZE)
    found = [
        row | shelf | choices("evit", row["keep_rate"], fusion)
        for row in paper.TABLES["off_the_shelf"]["rows"]
        for fusion in (True, False)  # which is not published
    ]
    names = {key: model["timm"][-1] for key, model in paper.MODEL_LIST.items()}
    for row in paper.training_runs():
        reducer = names[row["model"]].partition("_")[0]
        own = choices(reducer, row["keep_rate"], row["fusion"]) | dict(faster=row["ratio"])
        own |= dict(start=TUNED if row["finetuned"] else SCRATCH, images_per_s=row["throughput"])
        found.append(row | own)
    return frame([row | dict(name=bare(names[row["model"]])) for row in found])


def ours(content: Found) -> pd.DataFrame:
    """Make the settings of our runs, the mean over the seeds of each, and of our evaluations."""
    runs = [row | dict(way=f"{row['device']}, {row['precision']}") for row in content.runs.values()]
    points = frame([flat(row) for row in sum(map(of_evaluation, content.evaluations), runs)])
    points = points.sort_values("macs", ascending=False, kind="stable", ignore_index=True)
    seeds = points.groupby(["setting", "start"])
    one_way = points.groupby("section").way.transform("nunique") == 1
    speeds = seeds.images_per_s.transform("median")  # a busy machine moves it less than the mean
    means = {key: seeds[key].transform("mean") for key in ("top1", "top5")}
    points = points.assign(spread=seeds.top1.transform("std"), runs=seeds.top1.transform("size"))
    points = points.assign(**means, images_per_s=speeds.where(one_way))[seeds.cumcount() == 0]
    for _, group in points.groupby("section"):
        found = measured(content, group)
        if found.faster.notna().any():
            points.loc[group.index, SPEEDS] = found[SPEEDS]
    return beside_dense(points)


def of_evaluation(result: Row) -> list[Row]:
    model, data, trained = result["model"], result["data"], result["trained_keep_rate"]
    config, sha256 = result["config"], result["checkpoint_sha256"]
    rate, limit = choices("", trained, None)["rate"], config["max_val_images"]
    about = dict(model=model["name"], data=data["name"], recipe=sha256, started_from=sha256)
    about |= dict(timm_name=timm_name(config["model"]), max_val_images=limit, whole=not limit)
    about |= dict(start=SHELF if rate == DENSE else f"trained at {rate}")
    rows = [model | data | about | row for row in result["settings"] if row["macs"] is not None]
    if trained is None and all(results.one_rate(row["keep_rate"]) != 1 for row in rows):
        return []  # nothing says that the weights are a dense model's
    return [row | dict(setting=results.digest(row)) for row in rows]


def flat(row: Row) -> Row:
    """Make a setting of a row of runs.json, or of an evaluation's in the same form."""
    limits = dict(training=row.get("max_train_images"), validation=row["max_val_images"])
    images = ", ".join(f"{count} {name}" for name, count in limits.items() if count)
    whole_imagenet = row["num_classes"] == 1000 and row["whole"]
    return (
        dict(start=TUNED if row.get("from_checkpoint") else SCRATCH)
        | dict(selection="attentive" if row["reducer"] == "evit" else "")
        | row
        | choices(row["reducer"], row["keep_rate"], row["fusion"])
        | dict(section="ImageNet" if whole_imagenet else f"{row['data']}, {row['img_size']} px")
        | dict(images=images or {True: "", False: "limited", None: "unknown"}[row["whole"]])
        | dict(name=bare(row["timm_name"] or ""), val_images=row["max_val_images"])
        | dict(origin=row["started_from"], images_per_s=row.get("throughput"))
        | dict(macs=row["macs"] / 1e9, params=row["params"] / 1e6)
    )


def beside_dense(points: pd.DataFrame) -> pd.DataFrame:
    """Compare each setting with a dense one, which was trained by the same recipe: as long, on as
    many images of the same size. Else, a fine-tuned run is compared with what it began with."""
    models, keys = points.model.map(bare), ["start", "origin", "recipe", "img_size"]
    dense = points[points.rate == DENSE].sort_values("runs", ascending=False, kind="stable")

    def find(at: Any) -> Any:
        row = points.loc[at]
        among = dense[(models[dense.index] == models[at]) & (dense.val_images == row.val_images)]
        found = [among[(among[keys] == row[keys]).all(axis=1)]]
        if row.start == TUNED and row.origin:
            found += [among[among.setting == row.origin], among[among.origin == row.origin]]
        return next((one.index[0] for one in found if len(one)), -1)

    index = [find(at) for at in points.index]
    beside = points[NUMBERS].reindex(index).set_axis(points.index)
    faster = points.faster.fillna(points.images_per_s / beside.images_per_s)
    change, share = points.top1 - beside.top1, 100 * points.macs / beside.macs
    return points.assign(dense=index, change=change, share=share, faster=faster)


def measured(content: Found, points: pd.DataFrame) -> pd.DataFrame:
    """Look up the measured speeds, and macs, of settings: in the way in which most were."""
    timed = []
    for row in content.benchmarks:
        at_base = row["compared_with"].endswith(f"={paper.BASE_SIZE}")
        if row["what"] == "inference" and (at_base or row["model"] not in paper.NAMES):
            reducer = row.get("reducer") or row["model"].partition("_")[0]
            way = f"{row['device']}, batch {row['batch_size']:g}, {row['precision']}"
            way += f", compile={row['compile']}" * bool(row["compile"])
            own = choices(reducer, row["keep_rate"], row["fusion"]) | dict(way=way)
            own |= dict(name=bare(row["model"]), faster=row["ratio"], macs=row["macs"] / 1e9)
            timed.append(row | own)
    speeds = frame(timed).drop_duplicates(["way", *TIMED], keep="last")
    both = points[TIMED].reset_index().merge(speeds, on=TIMED)
    best = max(speeds.way.unique(), key=both.way.tolist().count, default="")
    return both[both.way == best].set_index("index").reindex(points.index)


def labels(points: pd.DataFrame) -> pd.DataFrame:
    """Write as texts what settings are; the recipe, a hash, only where nothing else differs."""
    keys = [points[key] for key in ("model", "start", "epochs", "img_size", "images")]
    recipes = points.recipe.replace("", None).groupby(keys, dropna=False).transform("nunique")
    numbers = {key: texts(points[key], "{:.0f}") for key in ("epochs", "runs")}
    shown = points.assign(recipe=points.recipe.str[:8].where(recipes > 1, ""), **numbers)
    shown = shown.replace(dict(images={"": "all"}, model=paper.TITLES))
    return shown[[*LABELS]].astype(str).rename(columns=LABELS)


def texts(values: pd.Series, form: str, missing: str = "") -> pd.Series:
    """Write numbers as text, and -0.00 as +0.00."""
    shown = values.map(lambda value: missing if pd.isna(value) else form.format(value))
    return shown.str.replace(r"^-(0\.0+)$", r"+\1", regex=True)


def of_settings(points: pd.DataFrame) -> list[Row]:
    """Make a table of our settings on each data set; a label of all rows stands in its note."""
    found = []
    for title, own in points.groupby("section", sort=False):
        own = own.sort_values(["start", "macs"], ascending=[True, False], kind="stable")
        which, same = labels(own), []
        for name in which.columns.difference(["keep rate", "the rest"]):
            absent = {""} if name in ("reducer", "kept") else set()  # a dense model has neither
            if len(values := set(which[name]) - absent) < 2:
                del which[name]
                same += [f"{name}: {value}" for value in values if value]
        which["top-1 (%)"] = texts(own.top1, "{:.2f}") + texts(own.spread, " ± {:.2f}")
        numbers = pd.DataFrame({k: texts(own[key], form) for k, (key, form) in SHOWN.items()})
        which = which.join(numbers.loc[:, (numbers != "").any()])
        notes = [f"{'; '.join(same).capitalize()}.", *(NOTES[k] for k in which if k in NOTES)]
        found.append(dict(title=title, note=" ".join(notes), frame=which))
    return found


def of_paper(content: Found, points: pd.DataFrame) -> list[Row]:
    """Make the tables of the paper: each number, ours, and ours less the paper's."""
    mine = points[(points.section == "ImageNet") & points.selection.isin(["", "attentive"])]
    mine = mine.assign(model=mine.model.map(paper.CONF))
    keys, found = "model reducer rate rest img_size start".split(), []
    for name, theirs in published().groupby("table", sort=False):
        both = theirs[[*keys, "epochs"]].reset_index().merge(mine, on=keys, suffixes=("_paper", ""))
        # LV-ViT's 300 epochs are 310 with those at its last learning rate.
        fits = both.epochs.between(both.epochs_paper, 1.1 * both.epochs_paper)
        both = both[fits | both.epochs_paper.isna()].drop_duplicates("index").set_index("index")
        own, speeds = both.reindex(theirs.index), measured(content, theirs)
        own = own.assign(faster=speeds.faster, macs=speeds.macs.fillna(own.macs))
        shown = labels(theirs)[["model", "weights", "epochs", "keep rate", "the rest", "px"]]
        shown = shown.loc[:, shown.replace("", None).nunique() > 1]
        seeds = own.runs.where(own.spread.notna())
        for title, (key, form) in METRICS.items():
            if theirs[key].notna().any():
                numbers = texts(own[key], "{:.2f}", "not run")
                if key == "top1":
                    numbers += texts(own.spread, " ± {:.2f}") + texts(seeds, ", {:.0f} runs")
                shown[f"{title}: paper"] = texts(theirs[key], form, "-")
                shown[f"{title}: ours"] = numbers
                shown[f"{title}: difference"] = texts(own[key] - theirs[key], "{:+.2f}")
        way, about = next(iter(speeds.way.dropna()), ""), paper.TABLES[name]
        note = "Speed is relative to the dense model of the same table at 224 px"
        note += f", ours on {way}." if way else "; ours has not been measured (src/benchmark.py)."
        found.append(dict(title=about["title"], note=about.get("note", note), frame=shown))
    return found


def provenance(content: Found) -> str:
    """List the devices, commits and versions of torch of the runs."""
    found = [(r["device"], r["commit"], r["packages"]["torch"]) for r in content.runs.values()]
    each = [", ".join(sorted(set(map(str, values)))) for values in zip(*found, strict=True)]
    return "{}; commit {}; torch {}.".format(*each) if each else "No run has finished."


def report(content: Found, found: list[Row], papers: list[Row]) -> str:
    """Write every table as Markdown, with the provenance of the runs, and the problems."""

    def text(table: Row) -> str:
        rows = markdown(table["frame"].to_dict("records"))
        return f"**{plain(table['title'])}**\n\n{rows}\n\n{plain(table['note'])}"

    parts = ["# Results", *map(text, found), plain(provenance(content))]
    if papers:
        parts += ["# Beside the paper", *map(text, papers)]
    if content.problems:
        parts += ["# Problems", "\n".join(f"- {plain(problem)}" for problem in content.problems)]
    return "\n\n".join(parts) + "\n"
