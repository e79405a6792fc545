"""A long training run on the CPU, watched: does anything grow, or slow down?

    python tests/soak.py MINUTES TARGET

Trains on JPEGs with RandAugment, erasing and mixup; evaluates, draws, saves checkpoints and tracks
with W&B (offline) every few seconds; and is terminated in the end. TARGET gets soak.json, soak.png
and table.md: memory, open files and threads of all of the run's processes, and CPU seconds for each
optimizer step (which, unlike images/s, other work on the machine does not change much). What grows
is named, and the exit status 1.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
from matplotlib.figure import Figure

from evit.report.results import git_commit

ROOT = Path(__file__).parents[1]
RUN = (
    "experiment=fashion_mnist name=soak overwrite=true seed=0 data.mode=jpg trainer=cpu "
    "recipe.epochs=10000 recipe.max_train_images=6000 recipe.max_val_images=1000 "
    "recipe.rand_augment=rand-m9-mstd0.5-inc1 recipe.random_erasing=0.25 recipe.mixup=0.8 "
    "recipe.cutmix=1 recipe.ema_decay=0.99 recipe.shrink_epochs=20 "
    "checkpoint_every_n_steps=40 logger.mode=offline"
).split()
# What is watched: name, unit, and by what share it may grow in the second half.
COLUMNS = {
    "memory": ("memory", "MiB", 0.03),
    "files": ("open files", "", 0.05),
    "threads": ("threads", "", 0.05),
    "cpu_per_step": ("CPU time per step", "ms", 0.1),
}


def watch(minutes: float, folder: Path, interval: float = 15) -> list[dict[str, Any]]:
    """Run src/train.py in a folder; what its processes held and did, every so many seconds."""
    command = [sys.executable, str(ROOT / "src" / "train.py"), *RUN]
    with (folder / "run.log").open("w") as log:
        run = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    samples: list[dict[str, Any]] = []
    started = time.monotonic()
    try:
        while time.monotonic() - started < 60 * minutes:
            time.sleep(interval)
            if run.poll() is not None:
                raise RuntimeError(f"the run has ended: see {folder / 'run.log'}")
            if steps := steps_done(folder):
                minute = (time.monotonic() - started) / 60
                samples.append(dict(minute=round(minute, 2), steps=steps, **state(run.pid)))
    finally:
        run.send_signal(signal.SIGTERM)
        run.wait()
    return samples


def steps_done(folder: Path) -> int:
    """Optimizer steps that have been logged."""
    rows = [path.read_text().splitlines() for path in folder.glob("outputs/soak/*/metrics.jsonl")]
    return json.loads(rows[0][-1])["step"] + 1 if rows and rows[0] else 0


def state(pid: int) -> dict[str, float]:
    """What a process and its children hold now, and the CPU seconds it has used."""
    run = psutil.Process(pid)
    processes = [run, *run.children(recursive=True)]
    return dict(
        memory=round(sum(process.memory_info().rss for process in processes) / 2**20, 1),
        files=sum(process.num_fds() for process in processes),
        threads=sum(process.num_threads() for process in processes),
        cpu_seconds=round(sum(run.cpu_times()[:2]), 2),
    )


def tenths(samples: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The samples' means in each tenth of the time, and CPU milliseconds for each of its steps."""
    size, rows = len(samples) // 10, []
    assert size > 1, f"{len(samples)} samples are too few"
    for i in range(10):
        part = samples[i * size : (i + 1) * size]
        row = {name: mean(s[name] for s in part) for name in ("memory", "files", "threads")}
        used = part[-1]["cpu_seconds"] - part[0]["cpu_seconds"]
        row["cpu_per_step"] = 1000 * used / (part[-1]["steps"] - part[0]["steps"])
        rows.append(row | dict(minute=part[-1]["minute"], steps=part[-1]["steps"]))
    return rows


def growing(samples: list[dict[str, Any]]) -> list[str]:
    """What has grown in the second half, compared with the fourth and fifth tenth."""
    rows, found = tenths(samples), []
    for name, (label, _, allowed) in COLUMNS.items():
        before, after = (mean(row[name] for row in part) for part in (rows[3:5], rows[8:]))
        if after > before * (1 + allowed):
            found.append(f"{label} has grown from {before:.1f} to {after:.1f}")
    return found


def markdown(samples: list[dict[str, Any]]) -> str:
    heads = [f"{name} ({unit})" if unit else name for name, unit, _ in COLUMNS.values()]
    lines = [["until minute", "steps", *heads], ["---:"] * (len(heads) + 2)]
    for row in tenths(samples):
        values = [f"{row[name]:.1f}" for name in COLUMNS]
        lines.append([f"{row['minute']:.0f}", f"{row['steps']}", *values])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(samples: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    rows = tenths(samples)
    for axis, (name, (label, unit, _)) in zip(axes, COLUMNS.items(), strict=True):
        points = rows if name == "cpu_per_step" else samples
        axis.plot([p["minute"] for p in points], [p[name] for p in points], color="#2a6f97")
        axis.set_ylim(0, 1.1 * max(p[name] for p in points))
        axis.set_ylabel(f"{label}\n({unit})" if unit else label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    return figure


def main(minutes: str, target: str) -> None:
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "run"
    work.mkdir(exist_ok=True)
    samples = watch(float(minutes), work)
    result = dict(commit=git_commit(), command=RUN, samples=samples)
    (folder / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "table.md").write_text(markdown(samples))
    draw(samples).savefig(folder / "soak.png", dpi=120)
    print(markdown(samples), end="")
    if found := growing(samples):
        sys.exit("; ".join(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
