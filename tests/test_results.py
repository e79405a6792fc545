"""What is committed under results/ is what the commands make of the committed numbers."""

import json

import pytest

from evit.report import benchmarks, found, tables
from tests.conftest import ROOT

RESULTS = ROOT / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/runs.json")), ids=lambda p: p.parent.name)
def test_the_table_of_runs_is_made_from_the_runs(path):
    assert path.with_name("table.md").read_text() == tables.markdown(found.read(path).rows)


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*/evaluation.json")), ids=lambda p: p.parent.name
)
def test_the_table_of_an_evaluation_has_its_numbers(path):
    table = path.with_name("table.txt").read_text()
    result = json.loads(path.read_text())
    for row in result["settings"]:
        assert f"{row['top1']:.2f}" in table and f"{row['loss']:.4f}" in table
    assert result["commit"] and result["packages"]["torch"]


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*/benchmark.json")), ids=lambda p: p.parent.name
)
def test_the_table_of_a_benchmark_is_made_from_its_numbers(path):
    result = json.loads(path.read_text())
    assert path.with_name("table.md").read_text() == benchmarks.markdown(result)
    assert not result["commit"].endswith("-dirty")


def test_the_page_leads_to_every_result():
    page = (RESULTS / "README.md").read_text()
    assert all(f"({folder.name}/" in page for folder in RESULTS.iterdir() if folder.is_dir())
