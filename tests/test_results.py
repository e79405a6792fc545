"""What is committed under results/ is what the commands make of the committed numbers."""

import json
import re
from statistics import mean

import pytest

from evit.commands import report
from evit.report import benchmark_text
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
    assert path.with_name("table.md").read_text() == benchmark_text(result)
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


def test_the_page_quotes_the_runs_at_any_rate():
    points = json.loads((RESULTS / "any_rate" / "any_rate.json").read_text())["points"]
    page, found = prose("results/README.md"), dict[str, dict[float, float]]()
    for point in points:
        found.setdefault(point["line"], {})[point["keep_rate"][0]] = mean(point["top1"])
    for line in ("one", "any 1", "any 4"):
        high, *rest, last = (f"{found[line][rate]:.1f}" for rate in (0.9, 0.7, 0.5, 0.3))
        assert re.search(rf"{high}(?: %)?, {', '.join(rest)} and {last}", page), line
    better = [found["any 4"][rate] - top1 for rate, top1 in found["one"].items()]
    assert f"{min(better):.1f} to {max(better):.1f} points better" in page
    assert f"{min(better):.1f} to {max(better):.1f} points better" in prose("README.md")
    worse = [top1 - found["any 1"][rate] for rate, top1 in found["one"].items()]
    assert f"{min(worse):.1f} to {max(worse):.1f} points behind" in page
    for line in ("self", "teacher", "places", "search"):
        assert all(f"{top1:.1f}" in page for top1 in found[line].values()), line


def test_the_pages_quote_the_runs_on_cifar10():
    rows = json.loads((RESULTS / "cifar10" / "runs.json").read_text())
    rows = [row for row in rows if row["img_size"] == 32]
    dense, *_ = (r["top1"] for r in rows if r["reducer"] == "none" and not r["from_checkpoint"])
    any_rate = json.loads((RESULTS / "cifar10_any_rate" / "evaluation.json").read_text())
    one = {row["keep_rate"][0]: row["top1"] for row in any_rate["settings"]}
    tuned = {  # for one epoch of all images
        rate: {
            row["top1"]
            for row in rows
            if row["fusion"] and row["keep_rate"] == rate and row["from_checkpoint"]
            if not row["max_train_images"] and row["top1"] != pytest.approx(one[0.5], abs=0.01)
        }
        for rate in (0.7, 0.5)
    }
    (at_07,), (at_05,) = tuned.values()
    readme, page = prose("README.md"), prose("results/README.md")
    assert f"has {dense:.1f} % top-1 when dense" in readme
    assert f"one epoch, has {at_07:.1f} and {at_05:.1f}" in readme
    assert f"has {one[0.7]:.1f} and {one[0.5]:.1f}" in readme
    assert f"Dense {dense:.1f};" in page
    for row in rows:
        if row["from_checkpoint"] and row["keep_rate"] == 0.5 and row["max_train_images"]:
            assert f"{row['top1']:.1f}" in page, row["reducer"]


def test_the_pages_quote_the_speed_on_cifar10():
    rows = json.loads((RESULTS / "cifar10_speed" / "benchmark.json").read_text())["rows"]
    ratios = {
        row["what"]: row["ratio"] for row in rows if row["keep_rate"][0] == 0.5 and row["fusion"]
    }
    said = f"infers {ratios['inference']:.2f} times and trains {ratios['training']:.2f} times"
    assert said in prose("results/README.md")
    assert f"infers {ratios['inference']:.1f} times as fast at 0.5" in prose("README.md")
    assert ratios["inference"] >= 1.8 and ratios["training"] >= 1.4


def prose(page: str) -> str:
    return " ".join((ROOT / page).read_text().split())


def test_the_readme_quotes_the_speeds():
    rows = json.loads((RESULTS / "speed_cpu/benchmark.json").read_text())["rows"]
    wanted = dict(batch_size=8, compile=False, keep_rate=[0.5] * 3, fusion=True)
    (ratio,) = (row["ratio"] for row in rows if wanted.items() <= row.items())
    assert f"keep rate 0.5, fused, is {ratio:.1f} times as fast as timm's" in prose("README.md")
    gpu, text = prose("results/speed_h200/README.md"), prose("README.md")
    for number in re.search(r"was ([\d.]+) times .* where ([\d.]+) times", text).groups():
        assert number in gpu and f"{number} times" in prose("results/README.md")


METHODS = dict(cover="`cover`", mctf="`mctf`", tome="`tome`", evit="EViT's fusion")


@pytest.mark.parametrize("reducer", METHODS)
def test_the_pages_quote_the_methods_of_reduction(reducer):
    rows = json.loads((RESULTS / "reducers" / "runs.json").read_text())
    rows = [row for row in rows if row["from_checkpoint"]]  # without the dense run they start from

    def top1(rate, reducer=None):
        found = (r for r in rows if r["keep_rate"] == rate and reducer in (None, r["reducer"]))
        return mean(row["top1"] for row in found)

    lost = " and ".join(f"{top1(1) - top1(rate, reducer):.1f}" for rate in RATES[1:3])
    quoted = re.compile(rf"{METHODS[reducer]}(, a [^,]*,)?( loses)? {lost}")
    assert quoted.search(prose("results/README.md"))
    assert reducer in ("mctf", "tome") or quoted.search(prose("README.md"))


def test_the_readme_quotes_the_time_of_training():
    text = (ROOT / "conf/experiment/evit_deit_s.yaml").read_text()
    hours = re.search(r"keep_rate=0.7 +79.5 +(\d+)", text)[1]
    assert f"about {hours} hours on eight A100 at keep rate 0.7" in prose("README.md")
    rows = json.loads((RESULTS / "training_cpu/benchmark.json").read_text())["rows"]
    (speed,) = (row["images_per_s"] for row in rows if row["keep_rate"] == [0.7] * 3)
    assert f"train {speed:.0f} images/s at keep rate 0.7" in prose("README.md")
    assert 30 * 1000 / speed / 60 == pytest.approx(40, abs=3)  # minutes


def test_the_page_leads_to_every_result():
    page = (RESULTS / "README.md").read_text()
    assert all(f"({folder.name}/" in page for folder in RESULTS.iterdir() if folder.is_dir())
