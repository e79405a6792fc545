"""docs/: the Python in it runs, one line after the other."""

import re

from tests.conftest import ROOT


def run(page):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S):
        exec(block, names)
    return names


def test_the_lines_about_python_run():
    names = run("python.md")
    assert names["features"].shape == (2, 192, 14, 14) and names["logits"].shape == (2, 1000)
    assert len(names["heat"]) == names["kept"][1].shape[1]
