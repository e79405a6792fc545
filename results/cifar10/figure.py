"""Draw top-1 of runs.json against the speed in ../cifar10_speed*/benchmark.json.

python results/cifar10/figure.py
"""

import json
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from evit.report.page import PALETTE

HERE = Path(__file__).parent


def speeds() -> dict[tuple[str, float, bool], float]:
    """Images/s as multiples of the dense model's, by reducer, keep rate and fusion."""
    found = {}
    for path in sorted(HERE.parent.glob("cifar10_speed*/benchmark.json"), reverse=True):
        for row in json.loads(path.read_text())["rows"]:
            if row["what"] == "inference" and len(set(row["keep_rate"])) == 1:
                name = "none" if row["dense"] else row.get("reducer") or "evit"
                rate = row["keep_rate"][0]
                if rate < 1 or row["dense"]:
                    found[name, rate, bool(row["fusion"]) and name == "evit"] = row["ratio"]
    return found


def points() -> dict[str, list[tuple[float, float, str]]]:
    """By line: speed, top-1 and keep rate."""
    known, lines = speeds(), dict[str, list[tuple[float, float, str]]]()
    found = json.loads((HERE.parent / "cifar10_any_rate/evaluation.json").read_text())["settings"]
    any_rate = {row["keep_rate"][0]: row["top1"] for row in found}
    lines["EViT, fused, any rate"] = [
        (known["evit", rate, True], any_rate[rate], f"{rate:g}") for rate in (0.7, 0.5)
    ]
    for row in json.loads((HERE / "runs.json").read_text()):
        name, rate, small = row["reducer"], row["keep_rate"], row["max_train_images"]
        key = name, rate, bool(row["fusion"]) and name == "evit"
        if row["img_size"] != 32 or key not in known:
            continue
        if name == "evit" and abs(row["top1"] - any_rate[0.5]) < 0.01:  # its own run
            continue
        start = "a tenth more" if small else "a third more" if row["from_checkpoint"] else "scratch"
        rest = ", fused" if key[2] else ", dropped" if name == "evit" else ""
        line = "dense" if name == "none" else f"{'EViT' if name == 'evit' else name}{rest}, {start}"
        if name != "none" or not row["from_checkpoint"]:
            lines.setdefault(line, []).append((known[key], row["top1"], f"{rate:g}"))
    return lines


def draw() -> None:
    with matplotlib.style.context(HERE.parent / "paper.mplstyle"):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot(
            xlabel="images/s of inference (times the dense model's)", ylabel="top-1 (%)"
        )
        for i, (line, found) in enumerate(sorted(points().items())):
            x, y, rates = zip(*sorted(found), strict=True)
            color, style = PALETTE[i % len(PALETTE)], "os^Dv"[i // len(PALETTE)]
            axes.plot(x, y, marker=style, color=color, label=line)
            for one in zip(rates, x, y, strict=True):
                axes.annotate(one[0], one[1:], textcoords="offset points", xytext=(3, 3), size=5)
        figure.legend(loc="outside right", frameon=False)
        figure.savefig(HERE / "accuracy_speed.svg", metadata=dict(Date=None))


if __name__ == "__main__":
    draw()
