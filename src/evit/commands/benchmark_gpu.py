"""paper=gpu: every GPU measurement of the project, in less than eight minutes on one card.

Without a GPU the same path runs on a CPU with tiny models.
"""

import json
import os
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

from evit.measure import speed
from evit.measure.contest import Group, contest
from evit.measure.entries import Entry, choose, compared
from evit.models import create_model

ROOT = Path(__file__).parents[3]
CASES = "evit_deit_s_k07_fuse_224 evit_deit_s_k05_drop_304 evit_lvvit_s_k05_fuse_304".split()
TINY_CASES = ["evit_tiny_k05_fuse", "evit_tiny_k05_drop"]  # of tests/golden, like those
ROWS_UNTIL, END = 345, 420  # seconds after which no model of DeiT-S, of any, is begun


def measure_all(config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Correctness, a training run, batch 1, a training step, and the paper's rows.

    What is left of the time goes to the paper's rows: 224 px and the rates 0.7 and 0.5 come first.
    """
    gpu, started = device.type == "cuda", time.perf_counter()
    config["target"] = config["target"] or ("results/speed_gpu" if gpu else None)
    large, dtype, graphs = 256 if gpu else 2, config["precisions"][0], gpu and "reduce-overhead"
    name = "evit_deit_small_patch16"
    core = [Entry(name, rate, fusion) for rate in (0.7, 0.5) for fusion in (True, False)]
    modes = dict.fromkeys([False, graphs])
    parts = [(core, Group("inference", 1, dtype, mode), END) for mode in modes]
    parts += [(core[::2], Group("training", large, dtype, mode), END) for mode in {False, gpu}]
    parts.append((core, Group("inference", large, dtype, False), END))
    for table, until in dict(deit_s=ROWS_UNTIL, lvvit_s=END).items():
        rows = sorted(
            choose(dict(paper=table)), key=lambda e: (e.img_size, e.keep_rate not in (0.7, 0.5))
        )
        parts.append((rows[: None if gpu else 4], Group("inference", large, dtype, graphs), until))
    result: dict[str, Any] = dict(rows=[], matmul=[], left_out=[])
    result["correctness"] = check_outputs(CASES if gpu else TINY_CASES, device)
    print("a training run through FFCV", flush=True)
    with TemporaryDirectory() as folder:
        write_photos(Path(folder, "photos/train"), 10_240 if gpu else 12)
        write_photos(Path(folder, "photos/val"), 2 * large)
        options = f"""data.root={folder}/photos data.cache_dir={folder}/ffcv keep_rate=0.5
            model={"evit_deit" if gpu else "evit_deit_micro"} img_size={224 if gpu else 28}
            recipe.batch_size={large} recipe.max_train_images=null"""
        result["training_run"] = train_briefly(options.split(), device)
    for entries, group, until in parts:
        print(group, flush=True)
        if not gpu:
            entries = [replace(entry, model=tiny(entry.model), img_size=32) for entry in entries]
        contest(result, compared(entries, gpu), group, device, config, started + until)
    return result


def tiny(model: str) -> str:
    return model.replace("small", "tiny").replace("lvvit_s", "lvvit_t")


@torch.no_grad()
def check_outputs(cases: list[str], device: torch.device) -> dict[str, Any]:
    """Compare logits and kept patches with those of the authors' code (tests/golden)."""
    golden = runpy.run_path(str(ROOT / "tests/models/golden.py"))
    speed.set_precision("fp32")
    rows: list[dict[str, Any]] = []
    for case in cases:
        meta, _ = golden["load"](case)
        kind = "evit_lvvit_s" if "lvvit" in case else "evit_deit_small_patch16"
        names = ("img_size", "num_classes", "keep_rate", "fusion", "embed_dim", "num_heads")
        model = create_model(kind, **{name: meta[name] for name in names})
        apart, same = golden["compare"](model.to(device), case)
        with torch.autocast(device.type, torch.bfloat16):
            low = golden["compare"](model, case)[0]
        rows.append(dict(case=case, float32=f"{apart:.1e}", bf16=f"{low:.1e}", same_patches=same))
    right = all(row["same_patches"] and float(row["float32"]) < 1e-4 for row in rows)
    verdict = "float32 agrees with the authors' code." if right else "float32 DISAGREES."
    title = "Logits beside those of the authors' code: largest difference, and the kept patches"
    return dict(title=title, rows=rows, verdict=verdict)


def train_briefly(overrides: list[str], device: torch.device) -> dict[str, Any]:
    """Train for two epochs in a process of its own; its speed, and its wait for data.

    Raises:
        ValueError: src/train.py's.
    """
    with TemporaryDirectory() as folder:
        options = f"""trainer={"cpu" if device.type == "cpu" else "auto"} logger=none
            hydra.run.dir={folder} recipe.epochs=2 recipe.eval_every=2 recipe.warmup_epochs=0
            recipe.shrink_start_epoch=0 recipe.shrink_epochs=0"""
        command = [sys.executable, str(ROOT / "src/train.py"), *options.split(), *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"the training run: {(done.stderr or done.stdout).splitlines()[-1]}")
        logged = [json.loads(row) for row in Path(folder, "metrics.jsonl").read_text().splitlines()]
        run = json.loads(Path(folder, "result.json").read_text())
    waited = [row["train/data_wait"] for row in logged if "train/data_wait" in row][-1]
    title = f"Training run: {' '.join(o for o in overrides if not o.startswith('data'))}, "
    title += f"{run['precision']}, {run['config']['data']['backend']}"
    verdict = f"Training waits for its images for {waited:.0%} of its time."
    row = dict(images_per_s=round(run["train_images_per_s"], 1), data_wait=round(waited, 4))
    return dict(title=title, rows=[row], verdict=verdict)


def write_photos(folder: Path, count: int) -> None:
    """Write JPEGs of 500 x 375 pixels in two class folders: 64 of noise, then links to those."""
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < 64:
            coarse = Image.merge("RGB", [Image.effect_noise((125, 94), 80) for _ in range(3)])
            coarse.resize((500, 375)).save(path, quality=90)
        else:
            os.link(folder / "ab"[i % 2] / f"{i % 64}.jpg", path)
