"""Collect the runs of sweeps/any_rate.yaml into any_rate.json; make table.md and the figure of it.

python results/any_rate/figure.py [outputs/any_rate outputs/any_rate_evaluated outputs/search]
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from evit.report import markdown
from evit.report.page import PALETTE
from evit.report.results import provenance

HERE = Path(__file__).parent
NAMES = {  # in the order of the legend
    "dense": "dense, off the shelf",
    "one": "one checkpoint for each rate",
    "any 1": "any rate, one epoch",
    "any 4": "any rate, four epochs",
    "self": "distilled from itself at rate 1",
    "teacher": "distilled from the dense model",
    "places": "searched rates at blocks 3, 6, 9",
    "search": "searched rates and blocks",
}


def kind(config: dict[str, Any]) -> str:
    """The line of NAMES that a run belongs to."""
    recipe, at = config["recipe"], (config["model"].get("reducer") or {}).get("at")
    if not config["checkpoint"]:
        return "dense"
    if recipe["any_rate"]:
        return f"any {recipe['epochs']}"
    if at:
        return "places" if set(at) <= {3, 6, 9} else "search"
    return {None: "one", "self": "self"}.get(recipe["teacher"], "teacher")


def collect(runs: Path, evaluated: Path, searched: Path) -> dict[str, Any]:
    """Top-1 by line, GMACs and keep rate, a number for each seed; and what searches found."""
    rows: dict[Any, list[float]] = defaultdict(list)
    for path in sorted(runs.glob("*/result.json")):
        result = json.loads(path.read_text())
        if (line := kind(result["config"])) in ("dense", "any 1", "any 4"):
            continue  # these are evaluated at all rates
        rates = result["model"]["keep_rate"]
        rows[line, result["model"]["macs"], *rates].append(result["top1"])
    for path in sorted(evaluated.glob("*/evaluation.json")):
        result = json.loads(path.read_text())
        line = kind(json.loads((Path(result["config"]["checkpoint"]) / "config.json").read_text()))
        for row in result["settings"]:
            rows[line, row["macs"], *row["keep_rate"]].append(row["top1"])
    points = [
        dict(line=line, gmacs=round(macs / 1e9, 5), keep_rate=list(rates), top1=top1)
        for (line, macs, *rates), top1 in rows.items()
    ]
    points.sort(key=lambda row: (list(NAMES).index(row["line"]), -row["gmacs"]))
    searches = []
    for path in sorted(searched.glob("*/front.json")):
        found = json.loads(path.read_text())
        names = "at", "keep_rate", "searched", "held_out"
        searches.append({name: found[name] for name in names} | found["budget"])
    searches.sort(key=lambda row: (-row["gmacs"], len(row["at"])))
    return dict(points=points, searches=searches) | provenance()


def table(points: list[dict[str, Any]]) -> str:
    """The points as Markdown; change: from the dense model that all were fine-tuned from."""
    rows, dense = [], points[0]["top1"][0]
    for point in points:
        rates = sorted(set(point["keep_rate"]), reverse=True)
        top1, seeds = point["top1"], len(point["top1"])
        rows.append(
            {
                "checkpoint": NAMES[point["line"]],
                "keep rate": rates[0] if len(rates) == 1 else point["keep_rate"],
                "GMACs": point["gmacs"],
                "seeds": seeds,
                "top-1 (%)": f"{mean(top1):.2f}" + (f" ± {stdev(top1):.2f}" if seeds > 1 else ""),
                "change": f"{mean(top1) - dense:+.2f}",
            }
        )
    return markdown(rows) + "\n"


def table_of_searches(searches: list[dict[str, Any]]) -> str:
    """What each search found for the dense model, and the uniform rate beside it, as Markdown."""
    rows = []
    for search in searches:
        at = ", ".join(map(str, search["at"]))
        for name, own in dict(uniform="", found=f"{search['keep_rate']} at {at}").items():
            (cost,) = (
                row["cost"]
                for row, kind in zip(search["searched"], ("dense", "uniform", "found"), strict=True)
                if kind == name
            )
            held = search["held_out"][name]
            rows.append(
                {
                    "budget (GMACs)": search["gmacs"],
                    "keep rates": own or "uniform",
                    "GMACs": round(cost, 5),
                    "KL to dense": f"{held['loss']:.3f}",
                    "top-1 (%)": f"{held['top1']:.2f}",
                }
            )
    return "Off the shelf, on the 512 images that were not searched on:\n\n" + markdown(rows) + "\n"


def draw(points: list[dict[str, Any]]) -> None:
    """Draw top-1 against GMACs, with the deviation over the seeds."""
    with matplotlib.style.context(HERE.parent / "paper.mplstyle"):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot(xlabel="GMACs (per image)", ylabel="top-1 (%)", ylim=(67, 82))
        for i, (line, name) in enumerate(NAMES.items()):
            rows = [row for row in points if row["line"] == line]
            axes.errorbar(
                [row["gmacs"] for row in rows],
                [mean(row["top1"]) for row in rows],
                [stdev(row["top1"]) if len(row["top1"]) > 1 else 0 for row in rows],
                label=name,
                color=PALETTE[i],
                marker="osDv^Pp*"[i],
                linestyle="-" if len(rows) > 2 else "none",
            )
        figure.legend(loc="outside right", frameon=False)
        figure.savefig(HERE / "any_rate.svg", metadata=dict(Date=None))


if __name__ == "__main__":
    if sys.argv[1:]:
        found = collect(*map(Path, sys.argv[1:]))
        (HERE / "any_rate.json").write_text(json.dumps(found, indent=1) + "\n")
    stored = json.loads((HERE / "any_rate.json").read_text())
    (HERE / "table.md").write_text(
        table(stored["points"]) + "\n" + table_of_searches(stored["searches"])
    )
    draw(stored["points"])
