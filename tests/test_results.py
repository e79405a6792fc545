"""What is committed under results/ is what the commands make of the committed numbers."""

import json
import re
from statistics import mean

import pytest

from evit.commands import report
from evit.report import benchmark
from tests import soak
from tests.conftest import ROOT

RESULTS = ROOT / "results"
RATES = (1, 0.7, 0.5, 0.3)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/runs.json")), ids=lambda p: p.parent.name)
def test_the_table_of_runs_is_made_from_the_runs(path, tmp_path):
    report.write(path, tmp_path, page=False)
    assert path.with_name("table.md").read_text() == (tmp_path / "table.md").read_text()


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
    assert path.with_name("table.md").read_text() == benchmark.markdown(result)
    assert not result["commit"].endswith("-dirty")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/index.html")), ids=lambda p: p.parent.name)
def test_a_page_has_the_accuracies_of_the_runs_beside_it(path):
    page, table = path.read_text(), path.with_name("table.md").read_text()
    accuracies = re.findall(r"[\d.]+ ± [\d.]+", table)
    assert accuracies and all(cell in page for cell in accuracies)


def test_the_soak_run_levelled_off_and_its_table_has_its_numbers():
    samples = json.loads((RESULTS / "soak" / "soak.json").read_text())["samples"]
    assert samples[-1]["minute"] > 59 and not soak.growing(samples)
    assert (RESULTS / "soak" / "table.md").read_text() == soak.markdown(samples)


def test_the_readme_quotes_the_sweep():
    rows = json.loads((RESULTS / "quick_keeprate" / "runs.json").read_text())
    rows = [row for row in rows if row["fusion"] or row["keep_rate"] == 1]
    top1, macs = (
        {rate: mean(row[key] for row in rows if row["keep_rate"] == rate) for rate in RATES}
        for key in ("top1", "macs")
    )
    shares = "{:.0f} %, {:.0f} % and {:.0f} %".format(*(100 * macs[r] / macs[1] for r in RATES[1:]))
    lost = "{:.1f}, {:.1f} and {:.1f}".format(*(top1[1] - top1[r] for r in RATES[1:]))
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{shares} of the dense model's MACs" in readme
    assert f"top-1 is {lost} points below its {top1[1]:.1f}" in readme


def test_the_page_leads_to_every_result():
    page = (RESULTS / "README.md").read_text()
    assert all(f"({folder.name}/" in page for folder in RESULTS.iterdir() if folder.is_dir())
