"""--help of every command: short, and begins with examples that compose."""

import os
import re
import signal
import subprocess
import sys
from string import Template

import pytest

from evit import commands as cli
from evit.commands import sweep
from tests.conftest import ROOT

NAMES = sorted(path.stem for path in (ROOT / "src").glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_the_help_fits_40_lines_and_begins_with_three_examples(name, capsys):
    if name == "sweep":
        sweep.run(["--help"])
        shown = capsys.readouterr().out
    else:
        help_text = cli.composed("config" if name == "train" else name, []).hydra.help.template
        shown = Template(help_text).substitute()  # as Hydra prints it
    lines = shown.splitlines()
    assert len(lines) <= 40 and not re.search(r"(?<!\w)_\w+", shown)  # no _base
    examples = [re.fullmatch(rf"#? +python src/{name}\.py ?(.*)", line) for line in lines[2:5]]
    assert all(examples), lines[:6]
    for example in filter(None, examples if name != "sweep" else []):
        config = "config" if name == "train" else name
        cli.composed(config, cli.arguments(example[1].split(), config))


def test_the_help_has_every_knob_with_its_default():
    shown = cli.composed("config", []).hydra.help.template
    assert re.search(r"^keep_rate: 0\.7 +# share", shown, re.M)
    assert "recipe: cifar10, deit, deit_finetune, dynamicvit," in shown


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [["train", "--help"], ["sweep", "cifar10_any_rate", "--dry-run"]])
def test_a_reader_that_ends_early_ends_the_command_without_a_traceback(words, buffered):
    name, *rest = words
    with subprocess.Popen(
        [sys.executable, ROOT / f"src/{name}.py", *rest],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | dict(PYTHONUNBUFFERED=buffered),
        text=True,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() in (1, 128 + signal.SIGPIPE)  # rich ends with 1
