"""All GPU measurements of the project, in less than eight minutes on one card.

    python tests/measure_gpu.py [TARGET] [--repeats N] [--min-seconds S] [--threads N] [--cpu]

TARGET, results/speed_gpu, gets table.md and benchmark.json: whether outputs agree with the authors'
code, how long a training run waits for its images, and models beside their dense baselines. The
remaining time goes to the paper's rows, 224 px and the rates 0.7 and 0.5 first. With --cpu the same
code runs with tiny models, as a rehearsal.
"""

import argparse
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from evit.commands.benchmark import write
from evit.files import telling
from evit.measure.speed import Entry, Group, choose, compare, compared, set_precision

ROOT = Path(__file__).parents[1]
CASES = {  # names in tests/golden, with a GPU and without
    True: "evit_deit_s_k07_fuse_224 evit_deit_s_k05_drop_304 evit_lvvit_s_k05_fuse_304",
    False: "evit_tiny_k05_fuse evit_tiny_k05_drop",
}
ROWS_UNTIL, END = 345, 420  # seconds after which no model of DeiT-S, of any, is begun


def measure(target: Path, gpu: bool, repeats: int, min_seconds: float) -> dict[str, Any]:
    """Measure everything; write table.md and benchmark.json into target."""
    started = time.perf_counter()
    device = torch.device("cuda" if gpu else "cpu")
    config = dict(paper="gpu", repeats=repeats, min_seconds=min_seconds)
    result: dict[str, Any] = dict(rows=[], matmul=[], left_out=[], config=config, at="")
    with telling(lambda: result["at"]):
        measure_all(result, config, device, started)
    target.mkdir(parents=True, exist_ok=True)
    result |= dict(seconds=round(time.perf_counter() - started, 1))
    write(result, device, [target])
    return result


def measure_all(
    result: dict[str, Any], config: dict[str, Any], device: torch.device, started: float
) -> None:
    gpu = device.type == "cuda"
    large, dtype, graphs = (256, "bf16", "reduce-overhead") if gpu else (2, "fp32", False)
    model, rates = "evit_deit_small_patch16", (0.7, 0.5) if gpu else (0.5,)
    core = [Entry(model, rate, fusion) for rate in rates for fusion in (True, False)]
    infer, train = (Group(what, large, dtype, False) for what in ("inference", "training"))
    single = infer._replace(batch_size=1)
    parts = [(core, single, END), (core[::2], train, END), (core, infer, END)]
    if gpu:
        parts.insert(0, (core, single._replace(compile=graphs), END))
        parts.insert(0, (core[::2], train._replace(compile=True), END))
    for table, until in dict(deit_s=ROWS_UNTIL, lvvit_s=END).items():
        rows = list(choose(dict(paper=table)))
        rows.sort(key=lambda entry: (entry.img_size, entry.keep_rate not in (0.7, 0.5)))
        parts.append((rows[: None if gpu else 3], infer._replace(compile=graphs), until))
    result["correctness"] = check_outputs(CASES[gpu], device)
    result["at"] = "a training run through FFCV"
    result["training_run"] = train_briefly(gpu, large)
    for entries, group, until in parts:
        print(group, flush=True)
        for i, entry in enumerate(entries if not gpu else []):
            name = entry.model.replace("small", "tiny").replace("lvvit_s", "lvvit_t")
            entries[i] = entry._replace(model=name, img_size=32)
        compare(result, compared(entries, gpu), group, device, config, started + until)


def check_outputs(cases: str, device: torch.device) -> dict[str, Any]:
    """Compare logits and kept patches with those of the authors' code (tests/golden)."""
    set_precision("fp32")
    rows = runpy.run_path(str(ROOT / "tests/models/golden.py"))["table"](cases.split(), device)
    right = all(row["same_patches"] and float(row["float32"]) < 1e-4 for row in rows)
    verdict = "float32 agrees with the authors' code." if right else "float32 DISAGREES."
    return dict(title="Logits: how far from the authors' code", rows=rows, verdict=verdict)


def train_briefly(gpu: bool, batch: int) -> dict[str, Any]:
    """Train for two epochs on images of noise, in its own process: speed and wait for data."""
    with TemporaryDirectory() as folder:
        for split, count in dict(train=20 * batch if gpu else 12, val=2 * batch).items():
            for i in range(count):
                path = Path(folder, "photos", split, "ab"[i % 2], f"{i}.jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                coarse = Image.merge("RGB", [Image.effect_noise((125, 94), 80) for _ in range(3)])
                coarse.resize((500, 375)).save(path, quality=90)
        model = "evit_deit img_size=224" if gpu else "evit_deit_micro img_size=28 trainer=cpu"
        options = f"""model={model} keep_rate=0.5 data.root={folder}/photos logger=none
            data.cache_dir={folder}/ffcv hydra.run.dir={folder}/run recipe.batch_size={batch}
            recipe.epochs=2 recipe.eval_every=2 recipe.max_train_images=null"""
        command = [sys.executable, str(ROOT / "src/train.py"), *options.split()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr or done.stdout).splitlines()[-1]
            raise RuntimeError(f"the training run: {last}")
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        run = json.loads(Path(folder, "run/result.json").read_text())
    waits = [row["train/data_wait"] for row in map(json.loads, lines) if "train/data_wait" in row]
    title = f"Training run: {model}, keep rate 0.5, batch {batch}, {run['precision']}, FFCV"
    speed = round(run["train_images_per_s"], 1)
    rows = [dict(images_per_s=speed, data_wait=round(waits[-1], 4))]
    verdict = f"Training waits for its images for {waits[-1]:.0%} of its time."
    return dict(title=title, rows=rows, verdict=verdict)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", nargs="?", type=Path, default=ROOT / "results/speed_gpu")
    parser.add_argument("--repeats", type=int, default=10, help="rounds")
    parser.add_argument("--min-seconds", type=float, default=0.1, help="per model and round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--cpu", action="store_true", help="rehearse with tiny models")
    given = parser.parse_args()
    if not given.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU here: --cpu rehearses with tiny models")
    torch.set_num_threads(given.threads)
    measure(given.target, not given.cpu, given.repeats, given.min_seconds)
