"""How commands begin and end: spelling, quotes, signals, one line for what a user can mend."""

import importlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from evit import commands as cli
from evit.config import CONF_DIR, overridden
from tests.conftest import HEARD, ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "src").glob("*.py") if path.stem != "sweep")
CONFIGS = {name: "config" if name == "train" else name for name in SCRIPTS}


@pytest.fixture
def start(monkeypatch, tmp_path, capfd):
    """Run src/NAME.py in this process in an empty folder; what it says, with status 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET_DIR", raising=False)

    real, task = importlib.import_module, SimpleNamespace(**dict.fromkeys(["run", *cli.FILES], run))
    ours = "evit.commands."

    def find(name: str, *more: str):
        return task if name.startswith(ours) else real(name, *more)

    monkeypatch.setattr(importlib, "import_module", find)

    def start(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.start(name, CONFIGS[name])
        assert ended.value.code == 2 and not list(tmp_path.glob("outputs*"))
        said = capfd.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
        return said

    return start


def run(cfg):
    raise ValueError("nothing was wrong")


WRONG = {
    "train keeprate=0.5": "unknown knob 'keeprate' in 'keeprate=0.5': did you mean keep_rate?",
    "train +keeprate=0.5": "did you mean keep_rate?",
    "train lr=0.1": "did you mean recipe.lr?",
    "train epochs=3": "did you mean recipe.epochs?",
    "train batch_size=3": "did you mean recipe.batch_size?",
    "train +recipe.epochs=3": "Either remove + prefix: 'recipe.epochs=3'",
    "train recipe.epoch=3": "did you mean recipe.epochs?",
    "train data.rot=x": "did you mean data.root?",
    "train model=evit_deits": "there is no model=evit_deits: did you mean evit_deit?",
    "train data=": "there are auto, cifar10, cifar100, fashion_mnist, folder, imagenet",
    "train recipe=": "there are cifar10, deit, deit_finetune, dynamicvit, fashion_mnist, lvvit",
    "train experiment=evit_deit": "did you mean evit_deit_s?",
    "train img_size=big": "img_size must be a number, got 'big'",
    "train name=/abs/dir": "for another, hydra.run.dir=/abs/dir",
    "evaluate keep_ratess=[1]": "did you mean keep_rates?",
    "evaluate batch_size=x": "batch_size must be a number, got 'x'",
    "benchmark repeat=3": "did you mean repeats?",
    "benchmark repeats=x": "repeats must be a number, got 'x'",
    "export formt=onnx": "did you mean format?",
    "visualize image=x": "did you mean images?",
    "prepare": "source=... is needed: conf/prepare.yaml says what it is for",
    "prepare skip_bad=perhaps source=x": "skip_bad must be true or false, got 'perhaps'",
    "report run=x": "did you mean runs?",
    "dashboard projct=x": "did you mean project?",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_one_line_with_the_way_out(line, start):
    assert WRONG[line] in start(*line.split())


def test_a_typo_in_an_experiment_of_ones_own_is_one_line_that_names_its_place(start, tmp_path):
    path = tmp_path / "mine/experiment/odd.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\nrecipe: {epochs: 3\nname: odd\n")
    said = start("train", "--config-dir", str(tmp_path / "mine"), "experiment=odd")
    assert "odd.yaml" in said and "line 3" in said


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_reaches_its_task(name, start):
    content = OmegaConf.to_container(OmegaConf.load(conf(name)), resolve=False)
    needed = [f"{key}=x" for key, value in content.items() if value == "???"]
    assert start(name, *needed) == "error: nothing was wrong\n"


def conf(name):
    return CONF_DIR / f"{CONFIGS[name]}.yaml"


ODD = [
    "~/x",
    "für/é",
    "a=b.ckpt",
    "epoch=3-step=100.ckpt",
    "a b",
    "a#b",
    "a(b",
    "a[b",
    "a{b",
]
ODD += [
    "it's",
    "back\\slash",
    "quote'\\'s",
    "a$b",
    "a@b",
    "a:b",
    "trailing ",
    'a"b',
    "100%",
    "a&b;c",
]


@pytest.mark.parametrize("path", ODD)
def test_a_path_is_taken_as_it_is_typed(path):
    knobs = {"train": "checkpoint", "evaluate": "checkpoint", "prepare": "source"}
    for name, knob in knobs.items():
        more = ["scale=own"] if name == "train" else []
        word = cli.arguments([f"{knob}={path}", *more], CONFIGS[name])[0]
        assert cli.composed(CONFIGS[name], [word])[knob] == path
        assert overridden([word]) == {knob}


@pytest.mark.parametrize("value", ["0.5", "[0.9,0.7,0.5]", "'a b'", "null", "0.5,0.7", "true"])
def test_what_hydra_understands_is_left_alone(value):
    assert cli.quoted(f"keep_rate={value}") == f"keep_rate={value}"


@pytest.mark.parametrize("arguments", [["--help"], ["keeprate=0.5"]])
def test_an_answer_without_pytorch_does_not_import_it(arguments):
    code = "import sys, train, atexit; atexit.register(lambda: print('torch' in sys.modules)); "
    code += f"sys.argv = {['train.py', *arguments]}; train.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True)
    assert done.stdout.split()[-1] == b"False", done


@pytest.mark.parametrize("number", HEARD)
def test_a_signal_ends_a_command_with_one_line(number, heard, capfd, monkeypatch):
    monkeypatch.setattr(HydraConfig, "initialized", lambda: False)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, cli.ended_in_a_line():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number and signal.getsignal(number) == before
    assert capfd.readouterr().err == f"stopped by {signal.Signals(number).name}\n"


def test_a_signal_that_was_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with cli.ended_in_a_line():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "procid", "requeued"),
    [
        (signal.SIGUSR1, "0", ["scontrol requeue 7"]),
        (signal.SIGUSR1, "1", []),
        (signal.SIGTERM, "0", []),
    ],
)
def test_sigusr1_requeues_a_job_of_slurm_once(number, procid, requeued, heard, monkeypatch, capfd):
    for name in ("PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", procid)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command: ran.append(" ".join(command)))
    with pytest.raises(SystemExit) as ended, cli.ended_in_a_line():
        os.kill(os.getpid(), number)
    assert (ended.value.code, ran) == (128 + number, requeued)
    assert capfd.readouterr().err.count("stopped by") == (procid == "0")


@pytest.mark.parametrize(
    ("given", "run", "left"),
    [
        ("", "work/outputs/dev/a", "work"),
        ("", "work/mine/a", "work"),
        ("out", "work/out/dev/a", "work/out"),
        ("../data/out", "data/out/dev/a", "data/out"),
        ("", "data/out/a", "data/out"),
    ],
)
def test_of_the_empty_folders_only_those_of_the_run_go(given, run, left, monkeypatch, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / run).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("EVIT_OUTPUT", given) if given else monkeypatch.delenv("EVIT_OUTPUT", False)
    monkeypatch.setattr(cli, "run_folder", lambda: tmp_path / run)
    with cli.ended_in_a_line():
        pass
    kept = tmp_path / left
    assert kept.is_dir() and not list(kept.iterdir()) and not (tmp_path / run).exists()
