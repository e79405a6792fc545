"""The README: every command runs (long ones made small), what it lists is what is there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from evit.config import CONF_DIR
from tests.conftest import QUICK, ROOT, write_photos
from tests.conftest import command as run

README = (ROOT / "README.md").read_text()
DOCS = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
SMALL = " ".join(QUICK)
DEMO = "recipe.max_train_images=128 recipe.max_val_images=32"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines of the shell blocks of a page, without comments."""
    lines = "".join(blocks("bash", text)).replace(" \\\n  ", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


# Each command of the README, and some of docs/; and what the test adds to it.
COMMANDS = {
    "make train": f'ARGS="{DEMO} hydra.run.dir=RUN data.cache_dir=CACHE"',
    "make test": 'ARGS="tests/test_schedule.py"',
    ".venv/bin/python src/train.py data.root=DIR recipe=deit_finetune pretrained=true": (
        f"{SMALL} pretrained=false recipe.finetune=false"
    ),
    ".venv/bin/python src/train.py data.root=DIR data.backend=imagefolder": f"{SMALL} seed=1",
    ".venv/bin/python src/train.py data.root=DIR recipe=deit_finetune checkpoint=CHECKPOINT "
    "keep_rate=0.5": f"{SMALL} keep_rate=0.5 name=tuned logger=none",
    "make imagenet ROOT=DIR": 'ARGS="imagenet=false"',
    ".venv/bin/python src/train.py experiment=evit_deit_s keep_rate=0.7 data.root=DIR-ffcv": (
        f"{SMALL} data=folder data.root=DIR-ffcv logger=none"
    ),
    ".venv/bin/torchrun --nproc-per-node=2 src/train.py data.root=DIR recipe=deit_finetune "
    "checkpoint=CHECKPOINT": (
        f"{SMALL} trainer=ddp trainer.accelerator=cpu trainer.log_every_n_steps=1 logger=none"
    ),
    ".venv/bin/python src/train.py experiment=evit_deit_s keep_rate=0.7 data.root=DIR-ffcv "
    "checkpoint_every_n_steps=500": f"{SMALL} data=folder data.root=DIR-ffcv logger=none",
    ".venv/bin/python src/train.py data.root=DIR recipe=deit_finetune checkpoint=CHECKPOINT "
    "reducer=cover": f"{SMALL} name=cover logger=none",
    ".venv/bin/python src/evaluate.py checkpoint=CHECKPOINT "
    "keep_rates=[1,0.9,0.8,0.7,0.6,0.5] fusion=[true,false]": "trainer=cpu",
    ".venv/bin/python src/evaluate.py checkpoint=CHECKPOINT reducer=[evit,merge,cover,tome] "
    "keep_rates=[0.7,0.5]": "trainer=cpu",
    ".venv/bin/python src/search.py checkpoint=CHECKPOINT images_per_s=1.3": (
        "images=4 images_per_s=null gmacs=0.013"
    ),
    ".venv/bin/python src/benchmark.py batch_sizes=[1,8,32] fusion=[true,false]": (
        "models=[evit_deit_tiny_patch16] batch_sizes=[1,2] img_sizes=[32] device=cpu repeats=1 "
        "min_seconds=0.01"
    ),
    ".venv/bin/python src/visualize.py checkpoint=CHECKPOINT images=DIR keep_rate=0.5": "",
    ".venv/bin/python src/predict.py checkpoint=CHECKPOINT images=DIR target=predictions.csv": "",
    ".venv/bin/python src/export.py checkpoint=CHECKPOINT keep_rate=0.5": "",
    "make sweep-keeprate DRY=1": "",
    "make sweep-cifar10_keeprate": f'ARGS="{SMALL} data=folder data.root=DIR job=4 '
    'name=test-readme data.cache_dir=CACHE"',
    "make report": 'ARGS="runs=RUN target=RUN/report"',
    "make sync": "RUNS=RUN/none",
    "make dashboard": "--dry-run",
    # docs/
    ".venv/bin/python src/train.py model=evit_deit keep_rate=0.5 img_size=304": (
        "model=evit_deit_tiny recipe.max_train_images=32 recipe.max_val_images=32"
    ),
    ".venv/bin/python src/prepare.py source=DIR target=DIR-small max_resolution=500": "",
    ".venv/bin/python src/evaluate.py checkpoint=CHECKPOINT model=evit_deit data.root=DIR "
    "keep_rates=[1,0.7,0.5]": "model=evit_deit_micro img_size=28 trainer=cpu",
    ".venv/bin/python src/visualize.py checkpoint=CHECKPOINT model=evit_deit images=DIR "
    "keep_rate=0.5 img_size=304": "model=evit_deit_micro img_size=56",
    ".venv/bin/python src/train.py model=evit_lvvit recipe=lvvit data.root=DIR "
    "data.label_maps=LABELS": (
        f"{SMALL} model=evit_lvvit data.root=SIX recipe.cooldown_epochs=0 img_size=32 "
        "+model.embed_dim=48 +model.depth=4 +model.num_heads=3 name=lvvit logger=none"
    ),
    ".venv/bin/python src/train.py model=dynamicvit_deit recipe=dynamicvit data.root=DIR "
    "checkpoint=CHECKPOINT": (
        f"{SMALL} model=dynamicvit_deit_micro recipe.backbone_frozen_epochs=0 name=dynamicvit "
        "logger=none"
    ),
    ".venv/bin/python src/benchmark.py paper=deit_s": (
        "batch_sizes=[1] device=cpu repeats=1 min_seconds=0.01"
    ),
    ".venv/bin/python src/train.py experiment=fashion_mnist recipe.any_rate=[1,0.9,0.7,0.5,0.3]": (
        f"{SMALL} data=folder data.root=DIR name=any_rate logger=none recipe.shrink_epochs=0"
    ),
}
SLOW = [".venv/bin/python src/benchmark.py paper=deit_s"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DONE: dict[str, str] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the commands run; with photos of six classes, and their label maps."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.rmtree(ROOT / "outputs/test-readme", ignore_errors=True)
    write_photos(folder / "six", train=1, val=1, classes=6)
    for path in (folder / "six/train").glob("*/*.jpg"):
        logits, ids = torch.randn(6, 4, 4).topk(5, 0)
        target = folder / "labels" / path.parent.name / f"{path.stem}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([logits, ids]).half(), target)
    yield folder
    shutil.rmtree(ROOT / "outputs/test-readme", ignore_errors=True)


def test_every_command_is_known_to_the_tests():
    listed = commands(README)
    assert listed == list(dict.fromkeys(listed))
    assert set(listed) <= set(COMMANDS) <= {*listed, *sum(map(commands, DOCS), [])}


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in COMMANDS]
)
def test_command_runs(command, folder, shared_photos):
    words = {"DIR": str(shared_photos), "RUN": str(folder / "run"), "CACHE": str(folder / "data")}
    words |= {"LABELS": str(folder / "labels"), "SIX": str(folder / "six")}
    for path in folder.glob("outputs/dev/*/checkpoints/best.ckpt"):
        if '"imagefolder"' in (path.parents[1] / "config.json").read_text():
            words["CHECKPOINT"] = str(path)
    names = "|".join(words | {"CHECKPOINT": ""})
    line = re.sub(rf"\b({names})\b", lambda m: words[m[0]], f"{command} {COMMANDS[command]}")
    program, *arguments = shlex.split(line)
    if program == ".venv/bin/python":
        script, *arguments = arguments
        done = run(script.removeprefix("src/"), *arguments, cwd=folder)
    else:
        cwd, words = (ROOT, [program]) if program == "make" else (folder, TORCHRUN)
        arguments = [re.sub("^src/", f"{ROOT}/src/", argument) for argument in arguments]
        env = {k: v for k, v in os.environ.items() if k not in ("IMAGENET_DIR", "MAKEFLAGS")}
        done = subprocess.run(
            [*words, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=400
        )
    assert done.returncode == 0, done.stdout + done.stderr
    DONE[command] = done.stdout


def test_the_demonstration_shows_its_table():
    assert re.search(r"top-1 +[\d.]+ %", DONE["make train"])
    assert "evit_deit_micro on fashion-mnist, 28 px" in DONE["make train"]


def test_without_images_the_embedded_set_is_used_and_said_first():
    output = DONE[".venv/bin/python src/train.py model=evit_deit keep_rate=0.5 img_size=304"]
    first, second = output.splitlines()[:2]
    assert "embedded Fashion-MNIST" in first and "data.root=DIR" in first
    assert "recipe.max_train_images=32, recipe.max_val_images=32" in second


def test_an_evaluation_shows_the_columns_of_this_page():
    output = next(v for k, v in DONE.items() if "fusion=[true,false]" in k and "keep_rates" in k)
    shown = [line.split() for line in output.splitlines()]
    assert sum("dropped" in line for line in shown) == 5
    assert any({"top-1", "KL", "GMACs"} <= set(line) for line in shown)


def test_reducers_are_evaluated_side_by_side():
    output = next(v for k, v in DONE.items() if "reducer=[" in k)
    for name in ("evit", "merge", "cover", "tome"):
        assert len(re.findall(rf"^.{{0,12}}\b{name} .*\d\.\d{{4}}", output, re.M)) == 2


def test_prepared_files_say_how_to_train_on_them(shared_photos):
    output = DONE[".venv/bin/python src/prepare.py source=DIR target=DIR-small max_resolution=500"]
    assert re.search(r"12 images in 2 classes.*12 as they were", output)
    assert f"data.root={shared_photos}-small" in output


def metrics(folder: Path, name: str) -> dict:
    """The last value of everything that a run of this name has logged."""
    (path,) = folder.glob(f"outputs/{name}/*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {key: value for row in rows for key, value in row.items()}


def test_token_labels_were_learnt_from(folder):
    logged = metrics(folder, "lvvit")
    assert logged["train/token_loss"] > 0 and logged["train/class_loss"] > 0


def test_dynamicvit_learnt_from_the_dense_model_that_it_started_from(folder):
    logged = metrics(folder, "dynamicvit")
    assert logged["train/class_distillation"] > 0 and logged["train/token_distillation"] > 0
    (path,) = folder.glob("outputs/dynamicvit/*/result.json")
    model = json.loads(path.read_text())["model"]
    assert model["fusion"] is False and model["macs_executed"] < model["macs"]


def test_the_sweep_ran_the_job_that_was_asked_for(folder):
    (path,) = (ROOT / "outputs/test-readme").glob("*/result.json")
    config = json.loads(path.read_text())["config"]
    assert (config["keep_rate"], config["seed"]) == (0.5, 0)
    assert "1 run, of which 0 have finished before" in DONE["make sweep-cifar10_keeprate"]


def test_the_list_of_a_sweep_has_every_run_with_its_hours():
    shown = DONE["make sweep-keeprate DRY=1"]
    states = "(?:missing|unfinished|finished|changed)"
    rows = re.findall(rf"^ +(\d+) .* {states} .* (\d+) *$", shown, re.M)
    assert [int(job) for job, _ in rows] == list(range(11))
    assert all(20 < int(hours) < 200 for _, hours in rows)


def test_the_report_shows_the_demonstration(folder):
    report = folder / "run/report"
    assert {path.name for path in report.iterdir()} == {"index.html", "tables.md", "runs.json"}
    rows = json.loads((report / "runs.json").read_text())
    results = [json.loads(path.read_text()) for path in (folder / "run").rglob("result.json")]
    assert len(results) == 1
    assert {row["top1"] for row in rows} == {result["top1"] for result in results}


def test_the_python_example_runs(folder):
    (example,) = blocks("python")
    example += "print(tuple(logits.shape), [ids.shape[1] for ids in kept], macs)"
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=folder, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[-2].startswith("(2, 1000) [138, 98, 70] 3"), done.stderr


def test_the_knobs_are_those_of_the_program():
    table = README.split("| knob |")[1].split("\n\n")[0]
    knobs = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    groups = set("reducer model data recipe trainer logger experiment scale".split())
    own = set(OmegaConf.load(CONF_DIR / "config.yaml")) - {"defaults", "hydra"}
    assert knobs == own | groups


@pytest.mark.parametrize(
    "group", ["reducer", "model", "data", "recipe", "trainer", "logger", "experiment"]
)
def test_the_choices_of_each_group_are_listed(group):
    row = next(line for line in README.splitlines() if line.startswith(f"| `{group}`"))
    there = {path.stem for path in (ROOT / "conf" / group).glob("[a-z]*.yaml")}
    assert set(re.findall(r"`(\w+)`", row.split("|")[2])) == there


def test_make_without_a_target_lists_every_target():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-z-]*)[%:]", makefile, re.MULTILINE)
    assert {"setup", "train", "test", "test-all", "test-slurm", "check", "sweep-"} <= set(targets)
    assert all(re.search(rf"^{target}", shown, re.MULTILINE) for target in targets)
    assert "keeprate" in shown
