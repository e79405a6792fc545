"""Time models in alternation with their dense baseline; write benchmark.json and tables."""

import json
import logging
import os
import runpy
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from evit.commands import checkpoint, composed
from evit.config import CONF_DIR, counted, listed
from evit.files import telling
from evit.measure.entries import Entry, choose, compared, facts
from evit.measure.speed import DTYPES, Group, compare, set_precision
from evit.report import benchmark, paper, results

ROOT = Path(__file__).parents[3]
DEFAULTS: dict[bool, dict[str, Any]] = {  # by whether there is a GPU
    True: dict(batch_sizes=[1, 32, 256], precisions="bf16", compile=list(benchmark.MODES)),
    False: dict(batch_sizes=8, precisions="fp32", compile=False),
}
ROWS = {"models", "checkpoint", "reducer", "keep_rates", "fusion", "img_sizes"}
CHOICES: dict[str, tuple[Any, ...]] = dict(
    device=("auto", "cpu", "cuda"),
    what=("inference", "training"),
    precisions=tuple(DTYPES),
    compile=tuple(benchmark.MODES),
    paper=(None, False, True, *paper.MODELS, "gpu"),
)
CASES = {  # names in tests/golden, with a GPU and without
    True: "evit_deit_s_k07_fuse_224 evit_deit_s_k05_drop_304 evit_lvvit_s_k05_fuse_304",
    False: "evit_tiny_k05_fuse evit_tiny_k05_drop",
}
ROWS_UNTIL, END = 345, 420  # seconds after which no model of DeiT-S, of any, is begun


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run a benchmark; write benchmark.json into Hydra's run folder.

    Raises: ValueError for an invalid configuration, before anything is written.
    """
    reducers = checkpoint.reducer_nodes(cfg)
    config: Any = {knob: OmegaConf.select(cfg, str(knob)) for knob in cfg if knob != "reducer"}
    config = OmegaConf.to_container(OmegaConf.create(config))
    device = complete(config)
    entries = choose(config | models(config, reducers)) if config["paper"] != "gpu" else {}
    for entry in sorted(entries, key=lambda entry: entry.dense):
        facts(entry)  # says what is wrong with a model
    torch.set_num_threads(config["threads"] or torch.get_num_threads())
    torch.manual_seed(config["seed"])
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it looks for a GPU
    started = time.perf_counter()
    result: dict[str, Any] = dict(rows=[], matmul=[], left_out=[], at="")
    with telling(lambda: result["at"]):
        if config["paper"] == "gpu":
            measure_all(result, config, device)
        else:
            names = ("what", "batch_sizes", "precisions", "compile")
            for values in product(*(config[name] for name in names)):
                group = Group(*values)
                print(f"{group}: {counted(len(entries), 'model')}", flush=True)
                compare(result, entries, group, device, config)
    del result["at"]
    result |= dict(config=config, device=results.device_name(device))
    result |= results.provenance() | dict(seconds=round(time.perf_counter() - started, 1))
    text = benchmark.markdown(result)
    print(f"\n{text}")
    for path in map(Path, filter(None, (HydraConfig.get().runtime.output_dir, config["target"]))):
        results.write_json(result, path / "benchmark.json")
        (path / "table.md").write_text(text)
        print(os.path.relpath(path / "table.md"))
    return result


def complete(config: dict[str, Any]) -> torch.device:
    """Choose the device, fill in what depends on it, turn single values into lists.

    Raises: ValueError if a knob is out of range, or has no effect beside another.
    """
    gpu = torch.cuda.is_available() and config["device"] != "cpu"
    for knob, value in (DEFAULTS[gpu] | dict(min_seconds=0.1 if gpu else 0.5)).items():
        config[knob] = value if config[knob] is None else config[knob]
    for knob in "models keep_rates fusion img_sizes what batch_sizes precisions compile".split():
        config[knob] = listed(config[knob])
    for knob, allowed in CHOICES.items():
        if wrong := [value for value in listed(config[knob]) if value not in allowed]:
            names = ", ".join(str(name).lower() for name in allowed)
            raise ValueError(f"{knob} must be of {names}, got {wrong[0]!r}")
    for knob in ("img_sizes", "batch_sizes", "repeats"):
        if not all(isinstance(value, int) and value > 0 for value in listed(config[knob])):
            raise ValueError(f"{knob} must be at least 1, got {config[knob]}")
    asked = config["device"], *config["precisions"], *config["compile"]
    if not gpu and (needs := {"cuda", "tf32", "reduce-overhead"}.intersection(asked)):
        raise ValueError(f"{', '.join(needs)} needs a GPU, and this runs on the CPU")
    if isinstance(config["paper"], str) and (both := checkpoint.given() & ROWS):
        names = ", ".join(sorted(both))
        raise ValueError(f"paper={config['paper']} chooses its rows itself: leave out {names}")
    return torch.device("cuda" if gpu else "cpu")


def models(config: dict[str, Any], reducers: dict[Any, Any]) -> dict[str, Any]:
    """Arguments of choose(): from a run's checkpoint, or models of conf/model or timm."""
    found: dict[str, Any] = dict(reducers=reducers or {None: {}})
    nodes = list[Any]()
    if config["checkpoint"]:
        run = checkpoint.open_source(config["checkpoint"]).run
        if "model" not in run:
            way = "it is not from a run of ours, so give models=[NAME] instead"
            raise ValueError(f"checkpoint={config['checkpoint']}: {way}")
        nodes, found["img_sizes"] = [run["model"]], [run["img_size"]]
        if (own := run["model"].get("reducer")) and not reducers:
            found["reducers"] = {own["_target_"].rpartition(".")[2].lower(): own}
    for name in [] if nodes else config["models"]:
        node: Any = OmegaConf.create(dict(model_name=name))
        if (CONF_DIR / f"model/{name}.yaml").is_file():
            node = composed("config", [f"model={name}"]).model
        nodes.append(OmegaConf.to_container(node))
    known = "_target_", "model_name", "pretrained", "reducer", "img_size"
    rest = [{k: v for k, v in node.items() if k not in known} for node in nodes]
    found["models"] = list(zip((node["model_name"] for node in nodes), rest, strict=True))
    return found


def measure_all(result: dict[str, Any], config: dict[str, Any], device: torch.device) -> None:
    """paper=gpu: every GPU measurement of the project, in less than eight minutes on one card.

    The remaining time goes to the paper's rows, 224 px and the rates 0.7 and 0.5 first. On a CPU
    the same code runs with tiny models.
    """
    gpu, started = device.type == "cuda", time.perf_counter()
    config["target"] = config["target"] or ("results/speed_gpu" if gpu else None)
    large, dtype, graphs = 256 if gpu else 2, config["precisions"][0], gpu and "reduce-overhead"
    model = "evit_deit_small_patch16"
    rates = (0.7, 0.5) if gpu else (0.5,)
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
            raise ValueError(f"the training run: {(done.stderr or done.stdout).splitlines()[-1]}")
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        run = json.loads(Path(folder, "run/result.json").read_text())
    *_, wait = (
        row["train/data_wait"] for row in map(json.loads, lines) if "train/data_wait" in row
    )
    title = f"Training run: {model}, keep rate 0.5, batch {batch}, {run['precision']}, FFCV"
    rows = [dict(images_per_s=round(run["train_images_per_s"], 1), data_wait=round(wait, 4))]
    verdict = f"Training waits for its images for {wait:.0%} of its time."
    return dict(title=title, rows=rows, verdict=verdict)
