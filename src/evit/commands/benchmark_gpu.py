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

import numpy as np
import torch
from PIL import Image

from evit.config import CONF_DIR
from evit.measure import speed
from evit.measure.contest import Group, contest, report, say
from evit.measure.entries import Entry, choose, compared
from evit.models import create_model, load_checkpoint

ROOT = Path(__file__).parents[3]
CASES = {  # of tests/golden
    "evit_deit_s_k07_fuse_224": "evit_deit_small_patch16",
    "evit_deit_s_k05_drop_304": "evit_deit_small_patch16",
    "evit_lvvit_s_k05_fuse_304": "evit_lvvit_s",
}
TINY_CASES = dict.fromkeys(("evit_tiny_k05_fuse", "evit_tiny_k05_drop"), "evit_deit_tiny_patch16")
ROWS_UNTIL, END = 345, 420  # seconds after which no model of DeiT-S, of any, is begun


def measure_all(config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Correctness, batch 1, a training step, a training run, and the paper's rows.

    What is left of the time goes to the paper's rows, of which those at 224 px come first.
    """
    gpu, started = device.type == "cuda", time.perf_counter()
    config["target"] = config["target"] or ("results/speed_gpu" if gpu else None)
    name, large, dtype = "evit_deit_small_patch16", 256 if gpu else 2, config["precisions"][0]
    graphs = "reduce-overhead" if gpu else False
    core = [Entry(name, rate, fusion) for rate in (0.7, 0.5) for fusion in (True, False)]
    modes = [False, graphs] if gpu else [False]
    parts = [(core, Group("inference", 1, dtype, mode), END) for mode in modes]
    parts += [
        (core[::2], Group("training", large, dtype, mode), END) for mode in sorted({False, gpu})
    ]
    parts.append((core, Group("inference", large, dtype, False), END))
    for table, until in dict(deit_s=ROWS_UNTIL, lvvit_s=END).items():
        rows = sorted(choose(dict(paper=table)), key=importance)
        rows = rows if gpu else rows[:4]
        parts.append((rows, Group("inference", large, dtype, graphs), until))
    result: dict[str, Any] = dict(rows=[], matmul=[], left_out=[])
    say(f"1/{len(parts) + 2} outputs of the authors' code, on this device")
    result["correctness"] = check_outputs(CASES if gpu else TINY_CASES, device)
    say(f"2/{len(parts) + 2} a training run through FFCV")
    with TemporaryDirectory() as folder:
        images, size = (10_240, 224) if gpu else (12, 28)
        write_photos(Path(folder, "photos/train"), images)
        write_photos(Path(folder, "photos/val"), 2 * large)
        options = f"""data.root={folder}/photos data.cache_dir={folder}/ffcv keep_rate=0.5
            model={"evit_deit" if gpu else "evit_deit_micro"} img_size={size}
            recipe.batch_size={large} recipe.max_train_images=null"""
        result["training_run"] = train_briefly(options.split(), device)
    for i, (entries, group, until) in enumerate(parts):
        say(f"{i + 3}/{len(parts) + 2} {group}")
        found = compared(entries if gpu else map(shrink, entries), at_base_size=gpu)
        contest(result, found, group, device, config, started + until)
    return result


def importance(entry: Entry) -> tuple[int, bool]:
    """The order of the paper's rows: 224 px and the rates 0.7 and 0.5 first."""
    return entry.img_size, entry.keep_rate not in (0.7, 0.5)


def shrink(entry: Entry) -> Entry:
    """The smallest model of the same family, for a CPU."""
    model = entry.model.replace("small", "tiny").replace("lvvit_s", "lvvit_t")
    return replace(entry, model=model, img_size=32)


@torch.no_grad()
def check_outputs(cases: dict[str, str], device: torch.device) -> dict[str, Any]:
    """Compare logits and kept patches with those of the authors' code (tests/golden).

    Raises:
        ValueError: this is not a checkout, whose tests hold the outputs.
    """
    path = ROOT / "tests/models/golden.py"
    if not path.is_file():
        raise ValueError("paper=gpu compares with tests/golden: run it in a checkout")
    golden: dict[str, Any] = runpy.run_path(str(path))
    speed.set_precision("fp32")
    rows: list[dict[str, Any]] = []
    for case, name in cases.items():
        meta, expected = golden["load"](case)
        sizes = {} if "_s_" in case else {k: meta[k] for k in ("embed_dim", "num_heads")}
        knobs = {k: meta[k] for k in ("img_size", "num_classes", "keep_rate", "fusion")}
        model = create_model(name, **knobs, **sizes).eval()
        load_checkpoint(model, dict(model=golden["weights"](meta)))
        model, images = model.to(device), golden["images"](meta).to(device)
        logits, kept = model(images, return_kept=True)
        apart = float(np.abs(logits.cpu().numpy() - expected["logits"]).max())
        same = all(
            np.array_equal(np.sort(ids.cpu().numpy(), 1), np.sort(expected[f"kept_{i}"], 1))
            for i, ids in enumerate(kept)
        )
        with torch.autocast(device.type, torch.bfloat16):
            low = model(images).float()
        relative = float((low - logits).norm() / logits.norm())
        row = dict(case=case, logits_apart=f"{apart:.1e}", same_patches=same)
        rows.append(row | dict(bf16_error=f"{relative:.1%}"))
    right = all(row["same_patches"] and float(row["logits_apart"]) < 1e-4 for row in rows)
    verdict = "float32 agrees with the authors' code." if right else "float32 DISAGREES."
    return dict(title="Outputs of the authors' code, float32 here", rows=rows, verdict=verdict)


def time_loader(config: dict[str, Any], device: torch.device, given: list[str]) -> dict[str, Any]:
    """Is training bound by its data? Train the first model on the user's images for two epochs.

    Args:
        given: the command line's overrides, of which the data's are the training's too.

    Raises:
        ValueError: src/train.py's.
    """
    model, *others = (config[name][0] for name in ("models", "fusion", "img_sizes", "precisions"))
    fusion, size, precision = others
    rate, reducer = str(config["keep_rates"][-1]).replace(" ", ""), config["reducers"][0]
    batch = max(config["batch_sizes"])
    images = config["max_images"] or batch * (100 if device.type == "cuda" else 8)
    if not (CONF_DIR / "model" / f"{model}.yaml").is_file():
        kind = "evit_deit" if model.startswith(("evit", "dynamic", "lvvit")) else "timm_vit"
        model = f"{kind} model.model_name={model}"
    options = f"""model={model} keep_rate={rate} fusion={fusion} img_size={size}
        seed={config["seed"]} compile={bool(config["compile"][0])} recipe.max_val_images=1
        recipe.max_train_images={images} recipe.batch_size={batch}
        trainer.precision={"bf16-mixed" if precision == "bf16" else "32-true"}"""
    more = [f"reducer={reducer}"] if reducer else []
    more += [override for override in given if override.startswith("data")]
    return train_briefly([*options.split(), *more], device)


def train_briefly(overrides: list[str], device: torch.device) -> dict[str, Any]:
    """Train for two epochs in a process of its own; its speed, and its wait for data.

    Raises:
        ValueError: src/train.py's.
    """
    report(f"a training run: {' '.join(overrides)}")
    with TemporaryDirectory() as folder:
        options = f"""trainer={"cpu" if device.type == "cpu" else "auto"} logger=none
            hydra.run.dir={folder} recipe.epochs=2 recipe.eval_every=2 recipe.warmup_epochs=0
            recipe.shrink_start_epoch=0 recipe.shrink_epochs=0"""
        command = [sys.executable, str(ROOT / "src/train.py"), *options.split(), *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            message = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
            raise ValueError(f"the training run: {message.removeprefix('error: ')}")
        logged = [json.loads(row) for row in Path(folder, "metrics.jsonl").read_text().splitlines()]
        run = json.loads(Path(folder, "result.json").read_text())
    waited = [row["train/data_wait"] for row in logged if "train/data_wait" in row][-1]
    model, size, batch = (
        run["choices"]["model"],
        *(run["config"][k] for k in ("img_size", "recipe")),
    )
    title = f"Training run: {model}, keep rate {run['config']['keep_rate']}, {size} px, "
    title += f"batch {batch['batch_size']}, {run['precision']}, {run['data']['name']} by "
    title += run["config"]["data"]["backend"]
    verdict = f"Training waits for its images for {waited:.0%} of its time"
    verdict += ": docs/loader.md." if waited > 0.05 else ", so it is not bound by them."
    row = dict(images_per_s=run["train_images_per_s"], data_wait=waited)
    return dict(title=title, rows=[row], verdict=verdict)


def write_photos(folder: Path, count: int, different: int = 64) -> None:
    """Write JPEGs of 500 x 375 pixels in two class folders; after some, links to those."""
    rng, paths = np.random.default_rng(0), list[Path]()
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < different:
            coarse = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        else:
            os.link(paths[i % different], path)
        paths.append(path)
