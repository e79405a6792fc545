"""Time models in alternation with their dense baseline; write benchmark.json and tables."""

from itertools import product, starmap
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from evit.commands import checkpoint, composed
from evit.config import CONF_DIR, counted, listed
from evit.files import telling
from evit.measure.speed import DTYPES, Group, choose, compare, facts
from evit.report import MODES, benchmark_text, paper, results

DEFAULTS: dict[bool, dict[str, Any]] = {  # by whether there is a GPU
    True: dict(batch_sizes=[1, 32, 256], precisions="bf16", compile=[*MODES], min_seconds=0.1),
    False: dict(batch_sizes=8, precisions="fp32", compile=False, min_seconds=0.5),
}
ROWS = {"models", "checkpoint", "reducer", "keep_rates", "fusion", "img_sizes"}
LISTS = "models keep_rates fusion img_sizes what batch_sizes precisions compile".split()
CHOICES: dict[str, tuple[Any, ...]] = dict(
    device=("auto", "cpu", "cuda"),
    what=("inference", "training"),
    precisions=tuple(DTYPES),
    compile=tuple(MODES),
    paper=(None, False, True, *paper.MODELS),
)


def run(cfg: DictConfig) -> None:
    config: Any = OmegaConf.to_container(cfg)
    config.pop("reducer", None)
    device = complete(config)
    entries = choose(config | models(config, checkpoint.reducer_nodes(cfg)))
    for entry in sorted(entries, key=lambda entry: entry.dense):
        facts(entry)  # says what is wrong with a model
    torch.set_num_threads(config["threads"] or torch.get_num_threads())
    torch.manual_seed(config["seed"])
    result: dict[str, Any] = dict(rows=[], matmul=[], left_out=[], config=config, at="")
    names = ("what", "batch_sizes", "precisions", "compile")
    with telling(lambda: result["at"]):
        for group in starmap(Group, product(*(config[name] for name in names))):
            print(f"{group}: {counted(len(entries), 'model')}", flush=True)
            compare(result, entries, group, device, config)
    write(result, device, [HydraConfig.get().runtime.output_dir, config["target"]])


def write(result: dict[str, Any], device: torch.device, folders: list[Any]) -> None:
    """Print the tables of what was measured; write them into folders."""
    del result["at"]
    result |= dict(device=results.device_name(device)) | results.provenance()
    print(f"\n{(text := benchmark_text(result))}")
    for folder in map(Path, filter(None, folders)):
        results.write_json(result, folder / "benchmark.json")
        (folder / "table.md").write_text(text)
        print(folder / "table.md")


def complete(config: dict[str, Any]) -> torch.device:
    """Choose the device, fill in what depends on it, turn single values into lists; check all."""
    gpu = torch.cuda.is_available() and config["device"] != "cpu"
    config |= {knob: v for knob, v in DEFAULTS[gpu].items() if config[knob] is None}
    config |= {knob: listed(config[knob]) for knob in LISTS}
    for knob, allowed in CHOICES.items():
        if wrong := [value for value in listed(config[knob]) if value not in allowed]:
            names = ", ".join(str(name).lower() for name in allowed)
            raise ValueError(f"{knob} must be of {names}, got {wrong[0]!r}")
    for knob in ("img_sizes", "batch_sizes", "repeats"):
        if not all(isinstance(value, int) and value > 0 for value in listed(config[knob])):
            raise ValueError(f"{knob} must be at least 1, got {config[knob]}")
    asked = {config["device"], *config["precisions"], *config["compile"]}
    if not gpu and (needs := {"cuda", "tf32", "reduce-overhead"} & asked):
        raise ValueError(f"{', '.join(needs)} needs a GPU, and this runs on the CPU")
    if isinstance(config["paper"], str) and (both := sorted(checkpoint.given() & ROWS)):
        raise ValueError(f"paper={config['paper']} chooses its rows: leave out {', '.join(both)}")
    return torch.device("cuda" if gpu else "cpu")


def models(config: dict[str, Any], reducers: dict[Any, Any]) -> dict[str, Any]:
    """Arguments of choose(): of a run's checkpoint, or of models of conf/model or timm."""
    sizes, nodes = config["img_sizes"], list[Any]()
    if source := config["checkpoint"]:
        run = checkpoint.open_source(source).run
        if "model" not in run:
            raise ValueError(f"checkpoint={source} is not of a run of ours: give models=[NAME]")
        nodes, sizes, own = [run["model"]], [run["img_size"]], run["model"].get("reducer")
        reducers = reducers or (own and {own["_target_"].rpartition(".")[2].lower(): own})
    for name in [] if source else config["models"]:
        known = (CONF_DIR / f"model/{name}.yaml").is_file()
        node = composed("config", [f"model={name}"]).model if known else dict(model_name=name)
        nodes.append(OmegaConf.to_container(OmegaConf.create(node)))
    apart = "_target_", "model_name", "pretrained", "reducer", "img_size"
    found = [(n["model_name"], {k: n[k] for k in n if k not in apart}) for n in nodes]
    return dict(models=found, reducers=reducers or {None: {}}, img_sizes=sizes)
