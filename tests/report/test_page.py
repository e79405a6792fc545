"""The report: its numbers are those of the files, and what is broken is named."""

import html
import json
import re
from pathlib import Path

import pytest

from evit.commands import report as command
from evit.report import page, paper, tables
from evit.report.collect import Found, read
from tests.conftest import ROOT
from tests.report import fake


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return fake.write_all(tmp_path_factory.mktemp("report") / "outputs")


@pytest.fixture(scope="module")
def report(root) -> Path:
    command.write(root, root.parent / "report")
    return root.parent / "report"


def embedded(text: str, name: str):
    return json.loads(
        re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text)[1]
    )


def beside(content: Found, name: str) -> dict:
    """A table of the paper, with ours."""
    made = tables.of_paper(content, tables.ours(content))
    return made[list(paper.TABLES).index(name)]


def sheet(content: Found, name: str) -> list[list[str]]:
    return beside(content, name)["frame"].values.tolist()


def test_the_page_has_the_numbers_of_every_result(root, report):
    text = (report / "index.html").read_text()
    rows = embedded(text, "runs")
    results = [json.loads(path.read_text()) for path in root.rglob("result.json")]
    assert len(rows) == len(results) == 9
    for result in results:
        (row,) = (
            row
            for row in rows
            if row["data"] == result["data"]["name"]
            and row["keep_rate"] == result["config"]["keep_rate"]
            and row["seed"] == result["config"]["seed"]
        )
        assert (row["top1"], row["top5"]) == (result["top1"], result["top5"])
        assert (row["macs"], row["params"]) == (result["model"]["macs"], result["model"]["params"])
    assert json.loads((report / "runs.json").read_text()) == rows


def test_a_chart_has_our_points_beside_the_paper_s(report):
    charts = {c["id"]: c for c in embedded((report / "index.html").read_text(), "charts")}
    views = {view["name"]: view for view in charts["imagenet"]["views"]}
    traces = {trace["name"]: trace for trace in views["speed-up"]["data"]}
    theirs, ours = traces["DeiT-S, evit, fused (paper)"], traces["DeiT-S, evit, fused"]
    assert dict(zip(ours["x"], ours["y"], strict=True)) == {1.52: 79.43, 1.9: 78.61}
    assert dict(zip(theirs["x"], theirs["y"], strict=True))[4385 / 2923] == 79.5
    assert theirs["marker"]["symbol"] == ours["marker"]["symbol"] + "-open"
    assert theirs["line"]["color"] == ours["line"]["color"]
    assert "DeiT-S, evit, dropped" not in traces


def test_every_axis_of_every_chart_says_its_unit(report):
    for chart in embedded((report / "index.html").read_text(), "charts"):
        for view in chart["views"]:
            assert all(re.search(r"\(.+\)", view[axis]) for axis in "xy"), view["name"]


def test_beside_the_paper_stand_ours_and_the_difference(root):
    rows = sheet(read(root), "keep_rate_deit_s")
    line = next(r for r in rows if r[:2] == ["0.7", "fused"])
    assert line[2:5] == ["79.5", "79.43", "-0.07"]
    assert line[8:11] == ["1.50", "1.52", "+0.02"]
    line = next(r for r in rows if r[:2] == ["0.7", "dropped"])
    assert line[2:5] == ["79.4", "not run", ""]
    line = next(r for r in sheet(read(root), "off_the_shelf") if r[0] == "0.7")
    assert line[1:] == ["fused", "78.5", "78.55", "+0.05"]


def test_every_row_of_the_paper_has_one_in_a_table():
    found = tables.published()
    found = found[(found.table != "off_the_shelf") | (found.rest != "dropped")]
    assert set(found.table) == paper.TABLES.keys()
    for name, rows in found.groupby("table"):
        numbers = re.findall(r"'top1': ([\d.]+)", str(paper.TABLES[name]))
        assert sorted(rows.top1) == sorted(map(float, numbers))


@pytest.mark.parametrize(
    "changes",
    [
        dict(epochs=100),
        dict(checkpoint="a.ckpt"),
        dict(max_train_images=1000),
        dict(num_classes=100),
        dict(keep_rate=0.75),
        dict(img_size=256),
    ],
    ids=str,
)
def test_a_run_of_another_kind_is_not_put_beside_the_paper(tmp_path, changes):
    fake.write(tmp_path / "run", fake.result(**changes))
    shown = beside(read(tmp_path), "keep_rate_deit_s")["frame"]
    assert set(shown["top-1 (%): ours"]) == {"not run"}


def test_a_run_is_put_beside_the_row_of_its_resolution(tmp_path):
    fake.write(tmp_path / "run", fake.result(keep_rate=0.5, img_size=304, top1=80.9))
    shown = beside(read(tmp_path), "resolution_deit_s")["frame"]
    (row,) = shown[shown["top-1 (%): ours"] != "not run"].to_dict("records")
    assert (row["px"], row["top-1 (%): paper"], row["top-1 (%): ours"]) == ("304", "81.0", "80.90")


def test_speeds_of_a_table_are_of_one_device_and_batch(tmp_path):
    few = fake.benchmark(dict(batch_size=1, images_per_s=9.0, ratio=9.0))
    rates = [dict(keep_rate=[r] * 3, images_per_s=40.0, ratio=1.5) for r in (0.7, 0.5)]
    for name, content in dict(a=few, b=fake.benchmark(*rates)).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "benchmark.json").write_text(json.dumps(content))
    table = beside(read(tmp_path), "keep_rate_deit_s")
    assert table["note"].endswith("ours on CPU (x86_64, 2 threads), batch 8, fp32.")
    own = list(table["frame"]["speed-up (x dense): ours"])
    assert sorted(own)[:3] == ["1.50", "1.50", "not run"]


def test_speeds_are_never_compared_across_devices(tmp_path):
    fake.write(tmp_path / "dense", fake.result(keep_rate=1.0, top1=79.9))
    fake.write(tmp_path / "evit", fake.result(top1=79.4))
    dense = dict(model="deit_small_patch16_224", keep_rate=[1.0] * 3, fusion=None, dense=True)
    (tmp_path / "a").mkdir()
    (tmp_path / "benchmark.json").write_text(
        json.dumps(fake.benchmark(dense | dict(images_per_s=27.5, ratio=1.0)))
    )
    other = fake.benchmark(dict(images_per_s=4000.0, ratio=1.5)) | dict(device="a GPU")
    (tmp_path / "a/benchmark.json").write_text(json.dumps(other))
    assert tables.ours(read(tmp_path)).images_per_s.notna().sum() == 1


def test_without_a_benchmark_speeds_are_the_runs_own_if_of_one_device(tmp_path):
    for name, rate, speed in (("dense", 1.0, 200.0), ("evit", 0.7, 300.0)):
        fake.write(tmp_path / name, fake.fashion(rate, 84.0, throughput=speed))
    points = tables.ours(read(tmp_path))
    assert list(tables.of_settings(points)[0]["frame"]["speed-up"]) == ["1.00", "1.50"]
    other = fake.fashion(0.5, 83.0, throughput=9000.0, device="a GPU")
    fake.write(tmp_path / "other", other)
    assert tables.ours(read(tmp_path)).images_per_s.isna().all()


def test_an_evaluation_without_the_dense_model_is_not_off_the_shelf(tmp_path):
    content = fake.evaluation()
    content["settings"] = content["settings"][1:]
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    assert tables.ours(read(tmp_path)).empty


def broken(folder: Path) -> None:
    (folder / "result.json").write_text('{"top1": 7')


def no_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()


def half_a_line(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')


def no_picture(folder: Path) -> None:
    (folder / "kept_patches.png").write_bytes(b"no picture")


def unfinished(folder: Path) -> None:
    (folder / "result.json").unlink()


def killed(folder: Path) -> None:
    unfinished(folder)
    reason = "killed by signal 9 (SIGKILL): out of memory?"
    (folder / "failed.json").write_text(json.dumps(dict(job="keep_rate=0.7", reason=reason)))


def other_kind(folder: Path) -> None:
    (folder / "result.json").write_text('["a list"]')


@pytest.mark.parametrize(
    ("spoil", "runs", "curves", "name"),
    [
        (broken, 1, 1, "bad/result.json"),
        (other_kind, 1, 1, "bad/result.json"),
        (no_metrics, 2, 1, "bad/metrics.jsonl"),
        (half_a_line, 2, 2, "bad/metrics.jsonl"),
        (no_picture, 2, 2, "bad/kept_patches.png"),
        (unfinished, 1, 1, "bad has not finished: no result.json"),
        (killed, 1, 1, "bad has not finished: killed by signal 9 (SIGKILL): out of memory?"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path, spoil, runs, curves, name):
    fake.write(tmp_path / "good", fake.fashion(1.0, 84.5))
    spoil(fake.write(tmp_path / "bad", fake.fashion(0.7, 83.9)))
    content = read(tmp_path)
    assert len(content.runs) == runs and len(content.curves) == curves
    (problem,) = content.problems
    assert name in problem and str(tmp_path) not in problem
    text = page.html(content)
    assert html.escape(name) in text.split('id="problems"')[1]


def test_the_dense_model_has_no_picture_of_surviving_patches(report):
    text = (report / "index.html").read_text()
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert len(captions) == 4 and not any("dense" in caption for caption in captions)


def test_two_runs_of_one_setting_and_seed_are_named_and_counted_once(tmp_path):
    fake.write(tmp_path / "a/run", fake.fashion(0.7, 83.0))
    fake.write(tmp_path / "b/run", fake.fashion(0.7, 84.0))
    content = read(tmp_path)
    assert [run["top1"] for run in content.runs.values()] == [83.0]
    assert content.problems == ["b/run is left out: a/run has its setting and its seed"]


def test_a_run_that_is_in_a_runs_json_too_is_one_run(tmp_path):
    fake.write(tmp_path / "outputs/run", fake.fashion(0.7, 83.0))
    command.write(tmp_path / "outputs", tmp_path / "outputs/report", page=False)
    content = read(tmp_path / "outputs")
    assert len(content.runs) == len(content.curves) == 1 and not content.problems


def test_names_from_the_data_are_text_and_nothing_else(tmp_path):
    name = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    fake.write(tmp_path / "<b>run", fake.fashion(0.7, 84.0, data=name))
    fake.write(tmp_path / "dense", fake.fashion(1.0, 84.0, data=name))
    (tmp_path / "<b>run/kept_patches.png").write_text("no picture")
    text = page.html(read(tmp_path))
    assert "<script>alert" not in text and "<img src=x" not in text and "<b>" not in text
    assert html.escape(name) in text and html.escape("<b>run") in text
    assert "<script>" not in tables.report(read(tmp_path), [], [])


def test_no_path_of_the_machine_is_in_the_report(root, report):
    for path in report.rglob("*.*"):
        content = path.read_bytes()
        assert b"secret" not in content and str(root).encode() not in content, path
    problem = "fashion/data.root-...+keep_rate-0.5+seed-1/metrics.jsonl cannot be read"
    assert problem in (report / "index.html").read_text()


def test_the_committed_results_make_a_page_without_problems():
    content = read(ROOT / "results")
    assert content.problems == []
    assert "fashion-mnist, 28 px" in page.html(content)
