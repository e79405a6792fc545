"""docs/python.md: its lines run, one after the other."""

import re

from tests.conftest import ROOT


def test_the_lines_run():
    page = (ROOT / "docs/python.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    assert names["features"].shape == (2, 192, 14, 14) and names["logits"].shape == (2, 1000)
    assert len(names["heat"]) == names["kept"][1].shape[1]
