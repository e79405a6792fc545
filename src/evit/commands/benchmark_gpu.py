"""paper=gpu: every GPU measurement of the project, in less than eight minutes on one card.

Without a GPU the same path runs on a CPU with tiny models.
"""

import json
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from evit.measure.entries import Entry, choose, compared
from evit.measure.speed import Group, contest, set_precision

ROOT = Path(__file__).parents[3]
CASES = {  # of tests/golden
    True: "evit_deit_s_k07_fuse_224 evit_deit_s_k05_drop_304 evit_lvvit_s_k05_fuse_304",
    False: "evit_tiny_k05_fuse evit_tiny_k05_drop",
}
ROWS_UNTIL, END = 345, 420  # seconds after which no model of DeiT-S, of any, is begun


def measure_all(result: dict[str, Any], config: dict[str, Any], device: torch.device) -> None:
    """Correctness, a training run, batch 1, a training step, and the paper's rows.

    What is left of the time goes to the paper's rows: 224 px and the rates 0.7 and 0.5 come first.
    """
    gpu, started = device.type == "cuda", time.perf_counter()
    config["target"] = config["target"] or ("results/speed_gpu" if gpu else None)
    large, dtype, graphs = 256 if gpu else 2, config["precisions"][0], gpu and "reduce-overhead"
    model = "evit_deit_small_patch16"
    core = [Entry(model, rate, fusion) for rate in (0.7, 0.5) for fusion in (True, False)]
    infer, train = (Group(what, large, dtype, False) for what in ("inference", "training"))
    parts = [(core, infer._replace(batch_size=1), END), (core[::2], train, END), (core, infer, END)]
    if gpu:
        parts.insert(0, (core, infer._replace(batch_size=1, compile=graphs), END))
        parts.insert(0, (core[::2], train._replace(compile=True), END))
    for table, until in dict(deit_s=ROWS_UNTIL, lvvit_s=END).items():
        rows = sorted(choose(dict(paper=table)), key=importance)[: None if gpu else 4]
        parts.append((rows, infer._replace(compile=graphs), until))
    result["correctness"] = check_outputs(CASES[gpu].split(), device)
    result["training_run"] = train_briefly(device, large)
    for entries, group, until in parts:
        print(group, flush=True)
        found = compared(entries if gpu else map(shrink, entries), gpu)
        contest(result, found, group, device, config, started + until)


def importance(entry: Entry) -> tuple[int, bool]:
    return entry.img_size, entry.keep_rate not in (0.7, 0.5)


def shrink(entry: Entry) -> Entry:
    """The smallest model of the same family, for a CPU."""
    model = entry.model.replace("small", "tiny").replace("lvvit_s", "lvvit_t")
    return replace(entry, model=model, img_size=32)


def check_outputs(cases: list[str], device: torch.device) -> dict[str, Any]:
    """Compare logits and kept patches with those of the authors' code (tests/golden)."""
    set_precision("fp32")
    rows = runpy.run_path(str(ROOT / "tests/models/golden.py"))["table"](cases, device)
    right = all(row["same_patches"] and float(row["float32"]) < 1e-4 for row in rows)
    verdict = "float32 agrees with the authors' code." if right else "float32 DISAGREES."
    title = "Logits, compared with the authors' code: largest difference, and whether patches agree"
    return dict(title=title, rows=rows, verdict=verdict)


def train_briefly(device: torch.device, batch: int) -> dict[str, Any]:
    """Train for two epochs through FFCV, in a process of its own: speed, and wait for data."""
    gpu = device.type == "cuda"
    print("a training run through FFCV", flush=True)
    with TemporaryDirectory() as folder:
        write_photos(Path(folder, "photos/train"), 20 * batch if gpu else 12)
        write_photos(Path(folder, "photos/val"), 2 * batch)
        model = "evit_deit img_size=224" if gpu else "evit_deit_micro img_size=28 trainer=cpu"
        options = f"""model={model} keep_rate=0.5 data.root={folder}/photos logger=none
            data.cache_dir={folder}/ffcv hydra.run.dir={folder}/run recipe.batch_size={batch}
            recipe.epochs=2 recipe.eval_every=2 recipe.warmup_epochs=0 recipe.max_train_images=null
            recipe.shrink_start_epoch=0 recipe.shrink_epochs=0"""
        command = [sys.executable, str(ROOT / "src/train.py"), *options.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"the training run: {(done.stderr or done.stdout).splitlines()[-1]}")
        rows = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        run = json.loads(Path(folder, "run/result.json").read_text())
    waited = [row["train/data_wait"] for row in map(json.loads, rows) if "train/data_wait" in row]
    speed = round(run["train_images_per_s"], 1)
    return dict(
        title=f"Training run: {model}, keep rate 0.5, batch {batch}, {run['precision']}, FFCV",
        rows=[dict(images_per_s=speed, data_wait=round(waited[-1], 4))],
        verdict=f"Training waits for its images for {waited[-1]:.0%} of its time.",
    )


def write_photos(folder: Path, count: int) -> None:
    """Write JPEGs of noise, 500 x 375 pixels, in two class folders."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.merge("RGB", [Image.effect_noise((125, 94), 80) for _ in range(3)])
        coarse.resize((500, 375)).save(path, quality=90)
