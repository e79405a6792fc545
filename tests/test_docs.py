"""docs/: what they name is there."""

import re

from tests.conftest import ROOT


def test_each_fault_names_a_test_that_exists():
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    named = [re.findall(r"`(tests/\S+\.py)::(\w+)`", row) for row in rows]
    headers = [row for row, tests in zip(rows, named, strict=True) if not tests]
    assert all(row.endswith("| what happens | proof |") for row in headers), headers
    for path, name in sum(named, []):
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
